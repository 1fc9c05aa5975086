//! What an adapter does to the weights of a network, layer by layer.

use crate::adapter::spectrum::SpectrumChange;
use crate::adapter::target::TargetRule;
use crate::attach::fixed::{Effect, effects};
use crate::attach::loaded::LoadedAdapter;
use crate::error::Result;
use crate::model::layers::Layers;
use crate::platform::host;
use crate::platform::observer::Observer;

/// What an adapter, as trained, does to each weight that it changes, of the layers that `only` matches where it is given. The network
/// stays as it is; the adapter's keys must fit it.
pub fn spectrum_changes(
    network: &mut dyn Layers,
    adapter: LoadedAdapter,
    only: Option<&TargetRule>,
    observer: &dyn Observer,
) -> Result<Vec<SpectrumChange>> {
    let mut found = Vec::new();
    effects(network, &mut [(adapter, 1.0)], &mut |effect| {
        if let Effect::Layer { layer, form: Some(form), .. } = effect
            && only.is_none_or(|rule| rule.matches(&layer.name))
        {
            observer.check(|| "stopped while measuring the weights".into())?;
            let weight = host::wide(&layer.matrix());
            found.push(SpectrumChange::new(&weight, &form.merged(&weight))?);
        }
        Ok(())
    })?;
    Ok(found)
}
