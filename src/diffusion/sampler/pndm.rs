//! PNDM: pseudo linear multistep of order 4 (PLMS), started by Runge-Kutta steps or, as Stable Diffusion's configs say,
//! by one repeated step. arXiv 2202.09778, eq. 9, 12, 13 and algorithm 2.

use tch::Tensor;

use crate::diffusion::noise::{Prediction, SchedulerConfig};
use crate::diffusion::sampler::Denoising;
use crate::diffusion::sampler::schedule::{PNDM, TimestepGrid, check_factors, root, scaled};
use crate::{Error, Result};

/// Runge-Kutta steps of four moves each, then multistep moves. Without the former the second of the latter repeats the
/// first, with the mean of both noises.
#[derive(Debug)]
pub(super) struct PndmSteps {
    runge_kutta: Vec<[Move; 4]>,
    multistep: Vec<Move>,
}

impl PndmSteps {
    pub(super) fn model_calls(&self) -> usize {
        4 * self.runge_kutta.len() + self.multistep.len()
    }

    /// Factors of clean latents and of noise at model call `call`.
    pub(super) fn level(&self, call: usize) -> (f32, f32) {
        let mut moves = self.runge_kutta.iter().flatten().chain(&self.multistep);
        moves.nth(call).expect("a call of this plan").level
    }
}

/// Ask the model at `timestep`, then go on by eq. 9: x' = of_x x - gain e / divisor. `signal` and `noise` turn a
/// velocity into e; `level` is those two at `timestep`, where x need not be.
#[derive(Debug)]
struct Move {
    timestep: f64,
    level: (f32, f32),
    signal: f32,
    noise: f32,
    of_x: f32,
    gain: f32,
    divisor: f32,
}

impl Move {
    /// `alpha_at` is a_t of `timestep`, the move goes from `alpha` to `alpha_next`.
    fn new(timestep: f64, alpha_at: f32, alpha: f32, alpha_next: f32) -> Result<Self> {
        let (beta, beta_next) = (1.0 - alpha, 1.0 - alpha_next);
        let of_x = root(alpha_next / alpha)?;
        let divisor = alpha * root(beta_next)? + root(alpha * beta * alpha_next)?;
        check_factors(timestep, &[of_x, 1.0 / divisor])?;
        let level = (root(alpha_at)?, root(1.0 - alpha_at)?);
        let (signal, noise) = (root(alpha)?, root(beta)?);
        Ok(Self { timestep, level, signal, noise, of_x, gain: alpha_next - alpha, divisor })
    }

    fn apply(&self, prediction: Prediction, x: &Tensor, out: Tensor) -> Tensor {
        let eps = match prediction {
            Prediction::Velocity => scaled(&out, self.signal) + scaled(x, self.noise),
            _ => out,
        };
        scaled(x, self.of_x) - scaled(&eps, self.gain) / f64::from(self.divisor)
    }
}

/// The second call of a plan goes back over the first one's step wherever `skip` makes it start, though only the whole list
/// repeats a timestep there: `diffusers` counts its calls, and later calls are then one timestep ahead of the latents.
pub(super) fn plan(config: &SchedulerConfig, steps: usize, skip: usize) -> Result<PndmSteps> {
    if config.prediction()? == Prediction::Sample {
        return Err(config.problem("prediction_type: pndm expects epsilon or v_prediction, found sample"));
    }
    let grid = TimestepGrid::new(&PNDM, config, steps)?;
    let stride = (grid.train() / steps) as i64;
    let last = if config.flag("set_alpha_to_one", false)? { 1.0 } else { grid.alphas_cumprod[0] };
    let times: Vec<i64> = grid.timesteps(steps).into_iter().map(|t| t.round_ties_even() as i64).collect();
    let go = |at: i64, from: i64, to: i64| -> Result<Move> {
        let alpha_next = if to < 0 { last } else { grid.alpha(to)? };
        Move::new(at as f64, grid.alpha(at)?, grid.alpha(from)?, alpha_next)
    };
    let onward = |t: &i64| go(*t, *t, t - stride);

    if config.flag("skip_prk_steps", false)? {
        let mut times = times;
        if let Some(&second) = times.get(1) {
            times.insert(1, second);
        }
        let moves = times.iter().skip(skip).enumerate();
        let moves = moves.map(|(i, t)| if i == 1 { go(*t, t + stride, *t) } else { onward(t) });
        return Ok(PndmSteps { runge_kutta: Vec::new(), multistep: moves.collect::<Result<_>>()? });
    }
    if skip > 0 {
        return Err(Error::config(
            "strength: pndm expects 1 with this scheduler config (skip_prk_steps is false), because its Runge-Kutta \
             steps begin at pure noise",
        ).with_hint("try another sampler"));
    }

    // Three Runge-Kutta steps cross the four first timesteps, with the model asked at both ends and twice half-way.
    let Some((&[a, b, c, d], rest)) = times.split_first_chunk::<4>() else {
        return Err(Error::config(format!(
            "steps: pndm expects 4 or more with this scheduler config (skip_prk_steps is not set), found {steps}"
        )));
    };
    let half = stride / 2;
    let cross = |from: i64, end: i64| -> Result<[Move; 4]> {
        let middle = end + half;
        Ok([
            go(from, from, from - half)?,
            go(middle, from, middle)?,
            go(middle, from, middle - half)?,
            go(end, from, end)?,
        ])
    };
    let runge_kutta = vec![cross(a, b)?, cross(b, c)?, cross(c, d)?];
    let multistep = std::iter::once(&d).chain(rest).map(onward).collect::<Result<_>>()?;
    Ok(PndmSteps { runge_kutta, multistep })
}

pub(super) fn run(
    plan: &PndmSteps,
    prediction: Prediction,
    mut x: Tensor,
    model: &mut Denoising,
) -> Result<Tensor> {
    let mut history = Vec::new();
    for moves in &plan.runge_kutta {
        let (next, out) = runge_kutta(moves, prediction, &x, model)?;
        x = next;
        history.push(out);
    }
    multistep(plan, prediction, x, history, model)
}

/// One step of eq. 13; also returns the model's answer at its start.
fn runge_kutta(
    moves: &[Move; 4],
    prediction: Prediction,
    x: &Tensor,
    model: &mut Denoising,
) -> Result<(Tensor, Tensor)> {
    let first = model.ask(x, moves[0].timestep)?;
    let mut mean = &first * (1.0 / 6.0);
    let mut at = model.keep(moves[0].apply(prediction, x, first.shallow_clone()));
    for middle in &moves[1..3] {
        let out = model.ask(&at, middle.timestep)?;
        mean += &out * (1.0 / 3.0);
        at = model.keep(middle.apply(prediction, x, out));
    }
    mean += model.ask(&at, moves[3].timestep)? * (1.0 / 6.0);
    Ok((model.keep(moves[3].apply(prediction, x, mean)), first))
}

/// The multistep moves (eq. 12), of lower order while `history`, the model's last answers, is short.
fn multistep(
    plan: &PndmSteps,
    prediction: Prediction,
    mut x: Tensor,
    mut history: Vec<Tensor>,
    model: &mut Denoising,
) -> Result<Tensor> {
    let start = x.shallow_clone();
    for (i, step) in plan.multistep.iter().enumerate() {
        let out = model.ask(&x, step.timestep)?;
        if i == 1 && plan.runge_kutta.is_empty() {
            x = model.keep(step.apply(prediction, &start, (out + &history[0]) / 2.0));
            continue;
        }
        if history.len() > 3 {
            drop(history.remove(0));
        }
        history.push(out);
        let mixed = match history.as_slice() {
            [a] => a.shallow_clone(),
            [b, a] => (a * 3.0 - b) / 2.0,
            [c, b, a] => (a * 23.0 - b * 16.0 + c * 5.0) / 12.0,
            [d, c, b, a] => (a * 55.0 - b * 59.0 + c * 37.0 - d * 9.0) * (1.0 / 24.0),
            _ => unreachable!("the history is cut to four answers"),
        };
        x = model.keep(step.apply(prediction, &x, mixed));
    }
    Ok(x)
}
