//! One cell of a comparison: a training, or the base model, on one subject.

use serde::{Deserialize, Serialize};

/// The name that the base model has where trained cells have a method.
pub const BASE: &str = "base";

/// What is done on one subject, and where.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "StoredCell", into = "StoredCell")]
pub struct PlannedCell {
    /// Its folder below `cells/`.
    pub id: String,
    /// A name of [`super::Plan::subjects`].
    pub subject: String,
    /// What is done there.
    pub work: CellWork,
}

/// What is done on a subject.
#[derive(Debug, Clone, PartialEq)]
pub enum CellWork {
    /// The model as it is is drawn from.
    Base,
    /// A method is trained and drawn from.
    Training {
        /// A label of [`super::Plan::methods`].
        method: String,
        seed: u64,
        learning_rate: f64,
    },
}

impl PlannedCell {
    /// Whether it is the base model on a subject, and no training.
    pub fn is_base(&self) -> bool {
        self.work == CellWork::Base
    }

    /// A label of [`super::Plan::methods`], or [`BASE`].
    pub fn method(&self) -> &str {
        match &self.work {
            CellWork::Base => BASE,
            CellWork::Training { method, .. } => method,
        }
    }

    /// Of the training; 0 for the base model.
    pub fn seed(&self) -> u64 {
        match self.work {
            CellWork::Base => 0,
            CellWork::Training { seed, .. } => seed,
        }
    }

    /// Of the training; `None` for the base model.
    pub fn learning_rate(&self) -> Option<f64> {
        match self.work {
            CellWork::Base => None,
            CellWork::Training { learning_rate, .. } => Some(learning_rate),
        }
    }
}

/// A cell in `plan.json` and `record.json`.
#[derive(Serialize, Deserialize)]
struct StoredCell {
    id: String,
    method: String,
    subject: String,
    seed: u64,
    learning_rate: Option<f64>,
}

impl From<PlannedCell> for StoredCell {
    fn from(cell: PlannedCell) -> Self {
        let (method, seed, learning_rate) = (cell.method().to_string(), cell.seed(), cell.learning_rate());
        Self { id: cell.id, method, subject: cell.subject, seed, learning_rate }
    }
}

impl TryFrom<StoredCell> for PlannedCell {
    type Error = String;

    fn try_from(cell: StoredCell) -> Result<Self, String> {
        let StoredCell { id, method, subject, seed, learning_rate } = cell;
        let work = match learning_rate {
            None if method == BASE => CellWork::Base,
            None => return Err(format!("cell {id}: expected a learning rate for {method}, found none")),
            Some(learning_rate) => CellWork::Training { method, seed, learning_rate },
        };
        Ok(Self { id, subject, work })
    }
}
