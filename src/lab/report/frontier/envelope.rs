//! The most likeness that drift buys: from points of (drift, likeness) to the curve above all of them.

/// The curve: through the points that no other one beats with less drift, straight between them, and level from the last of
/// them to the largest drift that was measured.
#[derive(Debug, Clone, PartialEq)]
pub struct Envelope {
    /// Numbers of the points on it, with drift and likeness, both ascending.
    points: Vec<(usize, f64, f64)>,
    reach: f64,
}

/// A place on a curve: a mixture of two of its points, by their numbers.
pub type Mixture = [(usize, f64); 2];

impl Envelope {
    /// Of points `(drift, likeness)`; `None` where one is not a finite number, or there is none.
    pub fn new(points: &[(f64, f64)]) -> Option<Self> {
        if points.is_empty() || points.iter().any(|(drift, likeness)| !(drift + likeness).is_finite()) {
            return None;
        }
        let mut order: Vec<usize> = (0..points.len()).collect();
        order.sort_by(|&a, &b| {
            let (a, b) = (points[a], points[b]);
            a.0.total_cmp(&b.0).then(b.1.total_cmp(&a.1))
        });
        let reach = points[order[order.len() - 1]].0;
        let mut best = f64::NEG_INFINITY;
        order.retain(|&i| {
            points[i].1 > best && {
                best = points[i].1;
                true
            }
        });
        Some(Self { points: order.into_iter().map(|i| (i, points[i].0, points[i].1)).collect(), reach })
    }

    /// The points on it, by their numbers, in the order of drift.
    pub fn points(&self) -> impl Iterator<Item = usize> {
        self.points.iter().map(|point| point.0)
    }

    /// The largest drift that was measured.
    pub fn reach(&self) -> f64 {
        self.reach
    }

    /// The largest likeness.
    pub fn top(&self) -> f64 {
        self.points[self.points.len() - 1].2
    }

    /// The place with a drift; `None` outside of what was measured.
    pub fn at_drift(&self, drift: f64) -> Option<Mixture> {
        if !(self.points[0].1..=self.reach).contains(&drift) {
            return None;
        }
        Some(self.between(drift, |point| point.1))
    }

    /// Likeness with this drift at the most; `None` outside of what was measured.
    pub fn likeness_at(&self, drift: f64) -> Option<f64> {
        self.at_drift(drift).map(|mixture| self.value(mixture, |point| point.2))
    }

    /// The most likeness with no more drift than this; `None` where every point has more.
    pub fn likeness_within(&self, drift: f64) -> Option<f64> {
        self.likeness_at(drift.min(self.reach))
    }

    /// The least drift with this likeness; `None` where no point, or every point, has so much.
    pub fn drift_at(&self, likeness: f64) -> Option<f64> {
        if !(self.points[0].2..=self.top()).contains(&likeness) {
            return None;
        }
        Some(self.value(self.between(likeness, |point| point.2), |point| point.1))
    }

    /// The mean likeness from drift 0 to `limit`: the area below the curve over its width. `None` where the curve does not
    /// begin at 0 or ends before the limit.
    pub fn mean_up_to(&self, limit: f64) -> Option<f64> {
        let end = self.likeness_at(limit).filter(|_| self.points[0].1 == 0.0 && limit > 0.0)?;
        let inside = self.points.iter().map(|p| (p.1, p.2)).filter(|(drift, _)| *drift < limit);
        let corners: Vec<(f64, f64)> = inside.chain([(limit, end)]).collect();
        let area: f64 = corners.windows(2).map(|w| (w[1].0 - w[0].0) * (w[0].1 + w[1].1) / 2.0).sum();
        Some(area / limit)
    }

    /// Where a coordinate that grows along the curve has a value that it reaches; beyond the last point, that point.
    fn between(&self, value: f64, of: fn(&(usize, f64, f64)) -> f64) -> Mixture {
        let after = self.points.iter().position(|point| of(point) >= value);
        let last = self.points.len() - 1;
        let (low, high) = match after {
            None => (last, last),
            Some(0) => (0, 0),
            Some(after) => (after - 1, after),
        };
        let (a, b) = (of(&self.points[low]), of(&self.points[high]));
        let part = if b > a { (value - a) / (b - a) } else { 0.0 };
        [(self.points[low].0, 1.0 - part), (self.points[high].0, part)]
    }

    fn value(&self, mixture: Mixture, of: fn(&(usize, f64, f64)) -> f64) -> f64 {
        let point = |number| self.points.iter().find(|p| p.0 == number).map_or(f64::NAN, of);
        mixture.iter().map(|(number, weight)| point(*number) * weight).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By hand: (4, .2) is beaten by (3, .5), (9, .6) by nothing, (12, .4) is the end of what was measured.
    const POINTS: [(f64, f64); 5] = [(9.0, 0.6), (0.0, 0.2), (4.0, 0.2), (3.0, 0.5), (12.0, 0.4)];

    #[test]
    fn the_curve_goes_through_what_nothing_beats_and_is_level_after_it() {
        let curve = Envelope::new(&POINTS).unwrap();
        assert_eq!(curve.points().collect::<Vec<_>>(), [1, 3, 0]);
        let close = |found: Option<f64>, expected: f64| (found.unwrap() - expected).abs() < 1e-15;
        assert!(close(curve.likeness_at(0.0), 0.2) && close(curve.likeness_at(1.5), 0.35));
        assert!(close(curve.likeness_at(6.0), 0.55) && close(curve.likeness_at(11.0), 0.6));
        assert_eq!((curve.likeness_at(12.1), curve.likeness_at(-0.1)), (None, None));
        assert!(close(curve.drift_at(0.35), 1.5) && close(curve.drift_at(0.6), 9.0));
        assert!(close(curve.likeness_within(13.0), 0.6) && close(curve.likeness_within(6.0), 0.55));
        assert_eq!(curve.likeness_within(-0.1), None);
        assert_eq!((curve.drift_at(0.61), curve.drift_at(0.19)), (None, None));
        // 3 (.2 + .5) / 2 + 6 (.5 + .6) / 2 + 3 * .6, over 12
        assert!(close(curve.mean_up_to(12.0), (1.05 + 3.3 + 1.8) / 12.0));
        assert_eq!(curve.mean_up_to(12.5), None);
    }

    #[test]
    fn one_point_is_a_curve_and_no_number_is_none() {
        let base = Envelope::new(&[(0.0, 0.3), (8.0, 0.1)]).unwrap();
        assert_eq!((base.likeness_at(8.0), base.drift_at(0.3), base.top()), (Some(0.3), Some(0.0), 0.3));
        assert_eq!(Envelope::new(&[(0.0, f64::NAN)]), None);
        assert_eq!(Envelope::new(&[]), None);
    }
}
