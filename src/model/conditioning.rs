//! What a prompt becomes: the tensors that a denoiser is told, a row for each sample of a batch.

use tch::Tensor;

/// Pooled text `(b, d)`, beside the states of Stable Diffusion XL.
pub const POOLED: &str = "pooled";

/// Numbers of the picture's sizes `(b, 6)`, of a refiner `(b, 5)`, beside the states of Stable Diffusion XL.
pub const SIZES: &str = "sizes";

/// Text states, and whatever else a kind of model is told beside them, by name. Every tensor's first dimension is the batch.
pub struct Conditioning {
    states: Tensor,
    beside: Vec<(&'static str, Tensor)>,
}

impl Conditioning {
    /// Of text states `(b, n, d)` alone.
    pub fn new(states: Tensor) -> Self {
        Self { states, beside: Vec::new() }
    }

    /// The same with another tensor `(b, ..)` beside, such as the pooled states of a second text encoder.
    pub fn with(mut self, name: &'static str, tensor: Tensor) -> Self {
        self.beside.push((name, tensor));
        self
    }

    /// Text states `(b, n, d)`.
    pub fn states(&self) -> &Tensor {
        &self.states
    }

    /// The same with the sizes that another one has, where it has some.
    pub fn with_sizes_of(self, other: Self) -> Self {
        match other.beside.into_iter().find(|(name, _)| *name == SIZES) {
            Some((name, sizes)) => self.with(name, sizes),
            None => self,
        }
    }

    /// A tensor beside the states.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.beside.iter().find(|(own, _)| *own == name).map(|(_, tensor)| tensor)
    }

    /// Number of rows.
    pub fn rows(&self) -> i64 {
        self.states.size()[0]
    }

    /// `length` rows from `start` on.
    pub fn narrow(&self, start: i64, length: i64) -> Self {
        self.map(|t| t.narrow(0, start, length))
    }

    /// All rows `times` times: a, b becomes a, b, a, b.
    pub fn repeat(&self, times: i64) -> Self {
        self.map(|t| {
            let mut shape = vec![1; t.dim()];
            shape[0] = times;
            t.repeat(&shape[..])
        })
    }

    /// Each row `times` times: a, b becomes a, a, b, b.
    pub fn repeat_rows(&self, times: i64) -> Self {
        self.map(|t| t.repeat_interleave_self_int(times, 0, None))
    }

    /// The rows of all, one after another; at least one, and all of one kind of model.
    pub fn cat(all: &[&Self]) -> Self {
        let cat =
            |get: &dyn Fn(&Self) -> Tensor| Tensor::cat(&all.iter().map(|c| get(c)).collect::<Vec<_>>(), 0);
        let beside = |i: usize| cat(&|c: &Self| c.beside[i].1.shallow_clone());
        Self {
            states: cat(&|c: &Self| c.states.shallow_clone()),
            beside: all[0].beside.iter().enumerate().map(|(i, (name, _))| (*name, beside(i))).collect(),
        }
    }

    /// As many zeros.
    pub fn zeros_like(&self) -> Self {
        self.map(Tensor::zeros_like)
    }

    /// The same tensors.
    pub fn shallow_clone(&self) -> Self {
        self.map(Tensor::shallow_clone)
    }

    fn map(&self, change: impl Fn(&Tensor) -> Tensor) -> Self {
        Self {
            states: change(&self.states),
            beside: self.beside.iter().map(|(name, t)| (*name, change(t))).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_tensors_of_a_row_stay_together() {
        let row = |i: i64| {
            let states = Tensor::full([1, 2, 3], i, (tch::Kind::Float, tch::Device::Cpu));
            Conditioning::new(states).with("pooled", Tensor::from_slice(&[10 * i]))
        };
        let both = Conditioning::cat(&[&row(1), &row(2)]);
        let rows = |c: &Conditioning| -> Vec<(f64, i64)> {
            let pooled = c.get("pooled").unwrap();
            (0..c.rows()).map(|i| (c.states().double_value(&[i, 1, 2]), pooled.int64_value(&[i]))).collect()
        };
        assert_eq!(rows(&both), [(1.0, 10), (2.0, 20)]);
        assert_eq!(rows(&both.repeat(2)), [(1.0, 10), (2.0, 20), (1.0, 10), (2.0, 20)]);
        assert_eq!(rows(&both.repeat_rows(2)), [(1.0, 10), (1.0, 10), (2.0, 20), (2.0, 20)]);
        assert_eq!(rows(&both.narrow(1, 1)), [(2.0, 20)]);
        assert_eq!(rows(&both.shallow_clone()), rows(&both));
        assert!(both.get("sizes").is_none());
    }
}
