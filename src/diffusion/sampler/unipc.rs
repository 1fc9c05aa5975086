//! UniPC of order 1 and 2 with B(h) updates: arXiv 2302.04867, algorithms 5 to 8, on data predictions. Each model call
//! first corrects the step that led to it (UniC), then predicts the next (UniP).

use tch::Tensor;

use crate::Result;
use crate::diffusion::noise::{Prediction, SchedulerConfig};
use crate::diffusion::sampler::Denoising;
use crate::diffusion::sampler::schedule::{UNIPC, check_factors, scaled};
use crate::diffusion::sampler::solver::{self, NoiseLevel};

/// Correct the latents that the step before led to, then predict the next.
#[derive(Debug)]
pub(super) struct UniPcStep {
    timestep: f64,
    level: NoiseLevel,
    corrector: Option<Update>,
    predictor: Update,
}

/// x' = of_x x - of_clean m0 - gain (earlier (m1 - m0) / ratio + later (m - m0)), where m0 is the prediction at x, m1
/// the one before and m, which only the corrector has, the one at x'.
#[derive(Debug)]
struct Update {
    of_x: f32,
    of_clean: f32,
    gain: f32,
    /// `earlier` and `ratio`; none in updates of first order.
    earlier: Option<(f32, f32)>,
    later: f32,
}

/// The settings of the two updates.
struct Solver {
    /// B(h) = h in place of e^h - 1.
    bh1: bool,
    levels: Vec<NoiseLevel>,
}

impl Solver {
    /// The update from level `from` to the next, of `order` 1 or 2.
    fn update(&self, from: usize, order: usize, correct: bool) -> Update {
        let (start, end) = (self.levels[from], self.levels[from + 1]);
        let h = end.lambda - start.lambda;
        let growth = (-h).exp_m1();
        let b_h = if self.bh1 { -h } else { growth };
        let ratio = (order == 2).then(|| (self.levels[from - 1].lambda - start.lambda) / h);
        // The paper's g_k: phi_(k+1)(-h) k! / B(h) for k = 1, 2, by the recurrence of phi.
        let phi_2 = growth / -h - 1.0;
        let phi_3 = phi_2 / -h - 0.5;
        let (g_1, g_2) = (phi_2 / b_h, phi_3 * 2.0 / b_h);
        let (earlier, later) = match (correct, ratio) {
            (false, ratio) => (ratio.map(|r| (0.5, r)), 0.0),
            (true, None) => (None, 0.5),
            // Solves e + l = g_1 and r e + l = g_2.
            (true, Some(r)) => {
                let earlier = (g_2 - g_1) / (r - 1.0);
                (Some((earlier, r)), g_1 - earlier)
            }
        };
        Update {
            of_x: end.sigma / start.sigma,
            of_clean: end.alpha * growth,
            gain: end.alpha * b_h,
            earlier,
            later,
        }
    }
}

impl Update {
    fn check(&self, timestep: f64) -> Result<()> {
        let (earlier, ratio) = self.earlier.unwrap_or((0.0, 1.0));
        let factors = [self.of_x, self.of_clean, self.gain, earlier, 1.0 / ratio, self.later];
        check_factors(timestep, &factors)
    }

    /// `history` holds the predictions up to m0, `now` is m.
    fn apply(&self, x: &Tensor, history: &[Tensor], now: Option<&Tensor>) -> Tensor {
        let m0 = &history[history.len() - 1];
        let base = scaled(x, self.of_x) - scaled(m0, self.of_clean);
        let earlier = self.earlier.map(|(factor, ratio)| {
            let m1 = &history[history.len() - 2];
            scaled(&((m1 - m0) / f64::from(ratio)), factor)
        });
        let later = now.map(|m| scaled(&(m - m0), self.later));
        match (earlier, later) {
            (Some(a), Some(b)) => base - scaled(&(a + b), self.gain),
            (Some(a), None) | (None, Some(a)) => base - scaled(&a, self.gain),
            (None, None) => base,
        }
    }
}

impl UniPcStep {
    /// Factors of clean latents and of noise where this step begins.
    pub(super) fn level(&self) -> (f32, f32) {
        (self.level.alpha, self.level.sigma)
    }
}

/// The order grows from 1, wherever `skip` makes the plan start.
pub(super) fn plan(config: &SchedulerConfig, steps: usize, skip: usize) -> Result<Vec<UniPcStep>> {
    if !config.flag("predict_x0", true)? {
        return Err(config.problem("predict_x0: unipc expects true, found false"));
    }
    let max_order = config.count("solver_order", 2)?;
    if !(1..=2).contains(&max_order) {
        return Err(config.problem(format!("solver_order: unipc expects 1 or 2, found {max_order}")));
    }
    let solver_types =
        [("bh2", false), ("bh1", true), ("midpoint", false), ("heun", false), ("logrho", false)];
    let bh1 = config.choice("solver_type", false, &solver_types)?;
    let lower_order_final = config.flag("lower_order_final", true)?;
    let uncorrected = config.indices("disable_corrector")?;
    let path = solver::path(&UNIPC, config, steps, false, f64::NEG_INFINITY)?;
    let solver = Solver { bh1, levels: path.levels };

    let len = path.timesteps.len();
    let order = |i: usize| {
        let left = if lower_order_final { len - i } else { max_order };
        max_order.min(i - skip + 1).min(left)
    };
    let step = |i: usize| -> Result<UniPcStep> {
        let timestep = path.timesteps[i];
        let corrected = i > skip && !uncorrected.contains(&(i as i64 - 1));
        let corrector = corrected.then(|| solver.update(i - 1, order(i - 1), true));
        let predictor = solver.update(i, order(i), false);
        for update in corrector.iter().chain([&predictor]) {
            update.check(timestep)?;
        }
        Ok(UniPcStep { timestep, level: solver.levels[i], corrector, predictor })
    };
    (skip..len).map(step).collect()
}

pub(super) fn run(
    steps: &[UniPcStep],
    prediction: Prediction,
    mut x: Tensor,
    model: &mut Denoising,
) -> Result<Tensor> {
    let mut start = x.shallow_clone();
    let mut history: Vec<Tensor> = Vec::new();
    for step in steps {
        let out = model.ask(&x, step.timestep)?;
        let clean = step.level.denoised(prediction, &x, out);
        if let Some(corrector) = &step.corrector {
            x = corrector.apply(&start, &history, Some(&clean));
        }
        if history.len() == 2 {
            drop(history.remove(0));
        }
        history.push(clean);
        start = x;
        x = model.keep(step.predictor.apply(&start, &history, None));
    }
    Ok(x)
}
