//! What a method is: its settings, and all that the rest of the program asks of it. A method implements [`MethodSettings`]
//! in its own file and has one line in [`super::methods`]; nothing else knows it by name.

use crate::adapter::Adapter;
use crate::adapter::how::ELSEWHERE;
use crate::adapter::peft_fields::Fields;
use crate::error::{Error, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_aux::serde_introspection::serde_introspect;
use serde_json::Value;
use std::any::Any;
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::Arc;
use tch::Tensor;

pub use crate::adapter::how::How;

/// The settings of a method.
pub trait MethodSettings: Comparable + Debug + Send + Sync {
    /// The word that names it on the command line.
    fn name(&self) -> &'static str;

    /// In a few words, such as `HRA r 8`.
    fn describe(&self) -> String;

    /// Refuses settings that cannot be trained on any layer.
    fn validate(&self) -> Result<()>;

    /// A new adapter for the frozen `weight`, `(d_out, d_in)` or `(d_out, c, kh, kw)`; draws on the CPU from `seed` alone.
    ///
    /// Errors: why this weight cannot be adapted so, and with which settings it could be.
    fn start(&self, weight: &Tensor, seed: u64) -> std::result::Result<Box<dyn Adapter>, String>;

    /// Number of values that train on a weight of this shape, `(d_out, d_in)` or `(d_out, c, kh, kw)`.
    ///
    /// Errors: those of [`Self::start`].
    fn parameters_for(&self, weight: &[i64]) -> std::result::Result<usize, String>;

    /// Whether every weight and norm of a network trains, in place of adapters on some layers: full fine-tuning.
    fn trains_whole_network(&self) -> bool {
        false
    }

    /// Whether biases can be trained and kept beside the adapter.
    fn keeps_bias(&self) -> bool {
        true
    }

    /// Whether Python's PEFT reads its files.
    fn is_known_to_peft(&self) -> bool {
        true
    }

    /// Whether all layers have the same settings. LoRA's may differ in rank and alpha.
    fn is_uniform(&self) -> bool {
        true
    }

    /// The last parts of its tensors' names in files, such as `hra_u`.
    fn tensor_names(&self) -> &'static [&'static str];

    /// What the sum of the regularisers ([`Adapter::regulariser`]) is multiplied by in the loss; 0 for none.
    fn regulariser_weight(&self) -> f64 {
        0.0
    }

    /// `peft_type` and its own fields in PEFT's `adapter_config.json`; `None` for what is no adapter.
    fn to_peft(&self) -> Option<(&'static str, Value)>;

    /// What PEFT's config has no field for, as text for the tensor file.
    fn metadata(&self) -> Vec<(&'static str, String)> {
        Vec::new()
    }

    /// Takes over what the tensors of a file, and its text, say of the settings that its config does not.
    ///
    /// Errors: where they contradict each other.
    fn settle(&mut self, _file: &FileFacts) -> std::result::Result<Vec<String>, Vec<String>> {
        Ok(Vec::new())
    }

    /// The adapter of one layer of a file. Errors: what is wrong with its tensors.
    fn adapter(&self, parts: Parts) -> std::result::Result<Box<dyn Adapter>, String>;

    /// Adapters of this method as one: see [`super::combine`]. `methods` are those of all files, layers have some of them.
    ///
    /// Errors: what cannot be one adapter of this method, and the reason.
    fn combine(&self, _methods: &[&Method], _layers: &[LayerChain], _how: How) -> Result<Combined> {
        Err(Error::config(format!("{} adapters cannot be combined without the base model", self.describe()))
            .with_hint(ELSEWHERE))
    }
}

/// Settings of any method, compared and told apart by their type.
pub trait Comparable: Any {
    /// Whether `other` is of the same type, with the same values.
    fn equals(&self, other: &dyn Any) -> bool;
}

impl<T: PartialEq + Any> Comparable for T {
    fn equals(&self, other: &dyn Any) -> bool {
        other.downcast_ref::<T>().is_some_and(|other| self == other)
    }
}

/// A method with its settings, shared.
#[derive(Debug, Clone)]
pub struct Method(Arc<dyn MethodSettings>);

impl Method {
    /// With these settings.
    pub fn new(settings: impl MethodSettings) -> Self {
        Self(Arc::new(settings))
    }

    /// The settings, if they are of this type.
    pub fn of<T: MethodSettings>(&self) -> Option<&T> {
        (&*self.0 as &dyn Any).downcast_ref()
    }

    /// Whether both have settings of one type, so that their adapters may be combined.
    pub fn is_like(&self, other: &Self) -> bool {
        (&*self.0 as &dyn Any).type_id() == (&*other.0 as &dyn Any).type_id()
    }
}

impl From<Box<dyn MethodSettings>> for Method {
    fn from(settings: Box<dyn MethodSettings>) -> Self {
        Self(settings.into())
    }
}

impl std::ops::Deref for Method {
    type Target = dyn MethodSettings;

    fn deref(&self) -> &Self::Target {
        &*self.0
    }
}

impl PartialEq for Method {
    fn eq(&self, other: &Self) -> bool {
        self.0.equals(&*other.0 as &dyn Any)
    }
}

/// A method as the registry lists it.
pub struct RegisteredMethod {
    /// The word that names it on the command line.
    pub name: &'static str,
    /// What it is, in a line.
    pub about: &'static str,
    /// Its own settings of a training.
    pub own: OwnSection,
    /// How it is read from PEFT's files; `None` where another entry reads them, or there are none.
    pub reader: Option<PeftReader>,
}

/// How a method is read from PEFT's `adapter_config.json`.
pub struct PeftReader {
    /// `peft_type`.
    pub peft_type: &'static str,
    /// What its tensors' names begin with, such as `hra_`.
    pub prefix: &'static str,
    /// The settings, with what is wrong left in the fields; `None` where another entry of this `peft_type` is meant.
    pub read: fn(&mut Fields) -> Option<Box<dyn MethodSettings>>,
}

/// A method's own settings of a training: what the section `[adapter]` holds beside what all methods have. A type of its own,
/// so that a setting of another method is an unknown field.
pub trait OwnSettings: Serialize + DeserializeOwned + Default {
    /// The method with these settings.
    fn method(self) -> Method;
}

/// [`OwnSettings`] of some type, as the registry holds them.
pub struct OwnSection {
    /// Names of all of them.
    pub keys: fn() -> &'static [&'static str],
    /// The method with what is given, and defaults for the rest. Errors: a key that it has not, a value of another type.
    pub method: fn(&toml::Table) -> std::result::Result<Method, toml::de::Error>,
    /// What is given, and defaults for the rest.
    pub whole: fn(&toml::Table) -> std::result::Result<toml::Table, toml::de::Error>,
}

impl OwnSection {
    /// Those of a type.
    pub const fn of<T: OwnSettings>() -> Self {
        fn read<T: OwnSettings>(table: &toml::Table) -> std::result::Result<T, toml::de::Error> {
            table.clone().try_into()
        }
        Self {
            keys: serde_introspect::<T>,
            method: |table| read::<T>(table).map(T::method),
            whole: |table| toml::Table::try_from(read::<T>(table)?).map_err(serde::de::Error::custom),
        }
    }
}

/// What a tensor file says beside its config.
pub struct FileFacts<'a> {
    /// All layers.
    pub layers: &'a [Parts],
    /// The file's own text.
    pub metadata: &'a BTreeMap<String, String>,
}

/// The tensors of one layer, by the method's names.
#[derive(Default)]
pub struct Parts {
    /// The layer.
    pub layer: String,
    /// Its name as the file has it, which patterns are matched with.
    pub name: String,
    /// By the last parts of their names.
    pub tensors: BTreeMap<&'static str, Tensor>,
}

impl Parts {
    /// Takes a tensor that must be there.
    pub fn take(&mut self, name: &str) -> std::result::Result<Tensor, String> {
        let tensor = self.tensors.remove(name);
        tensor.ok_or_else(|| format!("expected a tensor {name} beside the others, found none"))
    }
}

/// One of a layer's adapters.
pub struct Link<'a> {
    /// The settings of its file.
    pub method: &'a Method,
    /// The adapter.
    pub adapter: &'a dyn Adapter,
    /// 0 is the base model, 1 as trained.
    pub strength: f64,
}

impl<'a> Link<'a> {
    /// The adapter as the type that its method makes.
    pub fn get<T: Adapter>(&self) -> &'a T {
        (self.adapter as &dyn Any).downcast_ref().expect("adapters of one method are combined")
    }
}

/// A layer's name, and its adapters in the order given; at least one.
pub type LayerChain<'a> = (&'a str, Vec<Link<'a>>);

/// A method with its tensors by name.
pub type Combined = (Method, Vec<(String, Tensor)>);
