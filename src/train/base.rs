//! The model that a training starts from.

use crate::error::Result;
use crate::platform::hub::{self, Wanted};
use crate::platform::observer::Observer;
use crate::train::config::ModelSection;
use crate::weights::request::ModelRequest;

/// The model that the settings ask for, with its VAE; fetched where it is on the hub.
pub fn request(settings: &ModelSection, observer: &dyn Observer) -> Result<ModelRequest> {
    let vae = settings.vae.as_deref().map(|word| hub::resolve(word, Wanted::Vae, observer)).transpose()?;
    Ok(ModelRequest {
        path: hub::resolve(&settings.pretrained_model_name_or_path, Wanted::Model, observer)?,
        config: settings.model_config.clone(),
        vae,
        vae_dtype: settings.vae_dtype,
        prediction: settings.prediction,
    })
}
