//! The word that names a run's method: one of the registry's, or none.

use crate::adapter::method::RegisteredMethod;
use crate::adapter::methods::{self, METHODS};
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};

/// How the base model is adapted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MethodName(&'static str);

impl MethodName {
    /// No adapter: the control encoder trains alone.
    pub const NONE: Self = Self("none");

    /// What is used where nothing is said.
    pub const DEFAULT: Self = Self(METHODS[0].name);

    /// As it is written.
    pub fn name(self) -> &'static str {
        self.0
    }

    /// The method in the registry.
    pub fn entry(self) -> Option<&'static RegisteredMethod> {
        methods::find(self.0)
    }
}

impl std::fmt::Display for MethodName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

impl std::str::FromStr for MethodName {
    type Err = Error;

    fn from_str(word: &str) -> Result<Self> {
        let names: Vec<&str> = METHODS.iter().map(|entry| entry.name).chain([Self::NONE.0]).collect();
        let found = names.iter().find(|name| **name == word);
        found.map(|name| Self(name)).ok_or_else(|| {
            Error::config(format!("method: expected one of {}, found {word}", names.join(", ")))
        })
    }
}

impl Serialize for MethodName {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_str(self.0)
    }
}

impl<'de> Deserialize<'de> for MethodName {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}
