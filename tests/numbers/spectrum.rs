//! What a change does to a weight's rows, singular values and leading directions, on changes of which the answer is known.

use hra::adapter::spectrum::{LEADING, SpectrumChange};
use hra::platform::random::normal;
use tch::{Device, Kind, Tensor};

const F64: (Kind, Device) = (Kind::Double, Device::Cpu);

fn random(rows: i64, columns: i64, seed: u64) -> Tensor {
    normal(seed, &[rows, columns]).to_kind(Kind::Double)
}

/// The identity with a turn by `angle` (radians) from the first input towards the second.
fn turn(inputs: i64, angle: f64) -> Tensor {
    let h = Tensor::eye(inputs, F64);
    for (row, column, value) in
        [(0, 0, angle.cos()), (0, 1, angle.sin()), (1, 0, -angle.sin()), (1, 1, angle.cos())]
    {
        let _ = h.get(row).get(column).fill_(value);
    }
    h
}

#[test]
fn a_rotation_of_the_inputs_turns_rows_and_moves_no_singular_value() {
    for (rows, columns) in [(24, 7), (12, 12), (5, 30)] {
        let weight = random(rows, columns, 3);
        let (rotation, _) = Tensor::linalg_qr(&random(columns, columns, 4), "reduced");
        let found = SpectrumChange::new(&weight, &weight.matmul(&rotation)).unwrap();
        assert!(found.singular_values < 1e-13, "{found:?}");
        assert_eq!((found.intruders, found.leading), (0, LEADING.min(rows.min(columns)) as usize));
        assert!(found.angle > 30.0, "{found:?}");
    }
}

#[test]
fn rows_turn_by_the_angle_that_they_are_turned_by_however_small() {
    // Every row lies in the plane of the turn.
    let weight = Tensor::from_slice(&[2.0f64, 0.0, 0.0, 0.0, -3.0, 0.0, 1.0, 1.0, 0.0]).reshape([3, 3]);
    for degrees in [1e-7, 1.0, 30.0, 179.0] {
        let found = SpectrumChange::new(&weight, &weight.matmul(&turn(3, f64::to_radians(degrees)))).unwrap();
        assert!((found.angle / degrees - 1.0).abs() < 1e-6, "{degrees} {found:?}");
    }
    // A row of zeros has no angle.
    let with_zeros = Tensor::cat(&[&weight, &Tensor::zeros([1, 3], F64)], 0);
    let found = SpectrumChange::new(&with_zeros, &with_zeros.matmul(&turn(3, 0.5))).unwrap();
    assert!((found.angle - 0.5f64.to_degrees()).abs() < 1e-9, "{found:?}");
}

#[test]
fn a_direction_that_the_weight_did_not_have_is_an_intruder() {
    // Singular values 3, 2, 1 with the first three outputs as left singular vectors.
    let weight = Tensor::zeros([6, 3], F64);
    for i in 0..3 {
        let _ = weight.get(i).get(i).fill_((3 - i) as f64);
    }
    let same = SpectrumChange::new(&weight, &weight).unwrap();
    assert_eq!((same.intruders, same.leading, same.singular_values, same.angle), (0, 3, 0.0, 0.0));
    // The first column becomes (3, 0, 0, 0, 0, 10): its direction has a cosine of 3 / sqrt(109) = 0.29 to the first output.
    let added = weight.copy();
    let _ = added.get(5).get(0).fill_(10.0);
    let found = SpectrumChange::new(&weight, &added).unwrap();
    assert_eq!((found.intruders, found.leading), (1, 3));
    let expected = (109f64.sqrt() - 3.0) / 14f64.sqrt();
    assert!((found.singular_values - expected).abs() < 1e-12, "{found:?}");
    // With 4 in place of 10 the cosine is 0.6: no intruder.
    let _ = added.get(5).get(0).fill_(4.0);
    assert_eq!(SpectrumChange::new(&weight, &added).unwrap().intruders, 0);
    // Other values for the same directions: their order changes, and none is new.
    let swapped = Tensor::zeros([6, 3], F64);
    for i in 0..3 {
        let _ = swapped.get(i).get(i).fill_((1 + i) as f64);
    }
    let found = SpectrumChange::new(&weight, &swapped).unwrap();
    assert_eq!((found.intruders, found.singular_values), (0, 0.0));
}
