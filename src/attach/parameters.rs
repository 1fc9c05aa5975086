//! The tensors that train, of all networks together.
//!
//! They lie one after another in one flat f32 tensor, which an optimiser steps; the networks' tensors are views of it.

use crate::platform::host;
use tch::{Kind, Tensor};

/// Gradients are gathered, and moments and values updated, at most this many values at a time, so that the temporary
/// memory of a step stays small when a whole network trains. Most adapters fit into one piece.
const PIECE: usize = 1 << 24;

/// Trained tensors, flat, and the same memory as the network sees it.
pub struct Parameters {
    flat: Tensor,
    views: Vec<(String, Tensor)>,
    pieces: Vec<Piece>,
}

/// Neighbouring views that are stepped together.
pub(crate) struct Piece {
    views: std::ops::Range<usize>,
    /// Place in the flat tensor.
    pub(crate) start: i64,
    pub(crate) length: i64,
    /// Which learning rate it has.
    pub(crate) group: usize,
}

impl Parameters {
    /// Packs named tensors, in this order. The network must be given [`Self::views`] in their place. The tensors of
    /// one group share a learning rate.
    pub fn pack(groups: &[Vec<(String, Tensor)>]) -> Self {
        let _guard = tch::no_grad_guard();
        let total: usize = groups.iter().flatten().map(|(_, t)| t.numel()).sum();
        let device = groups.iter().flatten().next().map_or(host::CPU, |(_, t)| t.device());
        let flat = Tensor::empty([total as i64], (Kind::Float, device));
        let mut start = 0;
        let mut views = Vec::new();
        let mut pieces: Vec<Piece> = Vec::new();
        for (group, tensors) in groups.iter().enumerate() {
            for (name, t) in tensors {
                let n = t.numel() as i64;
                let view = flat.narrow(0, start, n).view(&t.size()[..]).detach();
                host::copy_into(&view, t);
                let at = views.len();
                views.push((name.clone(), view.set_requires_grad(true)));
                match pieces.last_mut() {
                    Some(p) if p.group == group && (p.length + n) as usize <= PIECE => {
                        p.views.end = at + 1;
                        p.length += n;
                    }
                    _ => pieces.push(Piece { views: at..at + 1, start, length: n, group }),
                }
                start += n;
            }
        }
        Self { flat, views, pieces }
    }

    /// The tensors that train, by name: leaves that share memory with the flat tensor.
    pub fn views(&self) -> &[(String, Tensor)] {
        &self.views
    }

    /// The same tensors by group.
    pub fn groups(&self) -> impl Iterator<Item = &[(String, Tensor)]> {
        self.pieces.chunk_by(|a, b| a.group == b.group).map(|pieces| {
            let (first, last) = (&pieces[0], &pieces[pieces.len() - 1]);
            &self.views[first.views.start..last.views.end]
        })
    }

    /// Number of trained values.
    pub fn count(&self) -> usize {
        self.flat.numel()
    }

    /// The values, flat.
    pub fn flat(&self) -> &Tensor {
        &self.flat
    }

    /// Norm of all gradients together, a scalar; the device is not waited for.
    pub fn gradient_norm(&self) -> Tensor {
        let _guard = tch::no_grad_guard();
        let norms: Vec<Tensor> = self.pieces.iter().map(|piece| self.gradient(piece).norm()).collect();
        match &norms[..] {
            [one] => one.shallow_clone(),
            _ => Tensor::stack(&norms, 0).norm(),
        }
    }

    /// The gradients of a piece, flat and in the order of the values; zero where a tensor was not used.
    pub(crate) fn gradient(&self, piece: &Piece) -> Tensor {
        let rows: Vec<Tensor> = self.views[piece.views.clone()]
            .iter()
            .map(|(_, t)| {
                let grad = t.grad();
                if grad.defined() { grad.reshape([-1]) } else { t.detach().zeros_like().reshape([-1]) }
            })
            .collect();
        Tensor::cat(&rows, 0)
    }

    /// What is stepped at a time, and where it lies in the flat tensor.
    pub(crate) fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// Forgets the gradients.
    pub fn zero_gradient(&mut self) {
        for (_, t) in &mut self.views {
            t.zero_grad();
        }
    }

    /// Replaces all values.
    pub fn set(&mut self, values: &Tensor) {
        let _guard = tch::no_grad_guard();
        host::copy_into(&self.flat, values);
    }
}
