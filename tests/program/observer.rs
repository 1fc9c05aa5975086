//! The library is silent: a training and a drawing tell everything to their observer, who can also stop them. One test, in a process
//! of its own, because it looks at what the whole process writes, which the test runner would keep to itself.

use crate::support::base::{pin_threads, root};
use crate::support::process::alone;
use crate::support::training::tiny_sd;
use hra::diffusion::sample::{Request, SampleSettings, Session};
use hra::diffusion::sampler::SamplerKind;
use hra::diffusion::stable_diffusion::StableDiffusion;
use hra::platform::observer::{Event, Observer};
use hra::train::config::TrainConfig;
use hra::train::{Resume, train};
use hra::{Error, ErrorKind};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use tch::{Device, Kind};

/// Keeps what it is told, and asks to stop after so many training steps.
#[derive(Default)]
struct Collector {
    told: Mutex<Vec<String>>,
    pictures: Mutex<Vec<PathBuf>>,
    losses: Mutex<Vec<f64>>,
    steps: Mutex<u64>,
    stop_after: Option<u64>,
}

impl Observer for Collector {
    fn tell(&self, event: Event) {
        match event {
            Event::Picture(path) => self.pictures.lock().unwrap().push(path.to_path_buf()),
            Event::Metrics(record) => self.losses.lock().unwrap().push(record["loss"].as_f64().unwrap()),
            Event::Progress { what: "training", done, .. } => *self.steps.lock().unwrap() = done,
            other => self.told.lock().unwrap().push(format!("{other:?}")),
        }
    }

    fn asks_to_stop(&self) -> bool {
        self.stop_after.is_some_and(|steps| *self.steps.lock().unwrap() >= steps)
    }
}

impl Collector {
    fn heard(&self, words: &str) -> bool {
        self.told.lock().unwrap().iter().any(|told| told.contains(words))
    }
}

/// What `work` lets this process write to its standard output and error.
fn written_by(work: impl FnOnce()) -> String {
    let mut file = tempfile::tempfile().unwrap();
    // SAFETY: copies of descriptors that are open for as long as the process lives, put back before they are closed.
    let kept: [OwnedFd; 2] = [1, 2].map(|fd| unsafe {
        let copy = OwnedFd::from_raw_fd(libc::dup(fd));
        assert!(libc::dup2(file.as_raw_fd(), fd) >= 0);
        copy
    });
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
    for (fd, copy) in [1, 2].into_iter().zip(&kept) {
        // SAFETY: as above.
        assert!(unsafe { libc::dup2(copy.as_raw_fd(), fd) } >= 0);
    }
    if let Err(panic) = outcome {
        std::panic::resume_unwind(panic);
    }
    let mut text = String::new();
    std::io::Seek::rewind(&mut file).unwrap();
    File::read_to_string(&mut file, &mut text).unwrap();
    text
}

fn config(run: &Path) -> TrainConfig {
    let assets = root().join("assets");
    let table = format!(
        "output_dir = {run:?}\n[model]\npretrained_model_name_or_path = {:?}\n\
         [data]\ninstance_data_dir = {:?}\ninstance_prompt = \"a sks cat face\"\n\
         [prior]\nwith_prior_preservation = true\nclass_prompt = \"a cat face\"\nnum_class_images = 2\nclass_steps = 2\n\
         [schedule]\nmax_train_steps = 4\n\
         [previews]\nvalidation_prompt = [\"a sks cat face\"]\nnum_validation_images = 1\nvalidation_steps = 2\n\
         validation_inference_steps = 2\n[checkpoints]\nlog_every = 1\ncheckpointing_steps = 2\n",
        tiny_sd(),
        assets.join("subjects/cat/train"),
    );
    TrainConfig::from_tables(&[&table.parse().unwrap()]).unwrap()
}

#[test]
fn a_training_and_a_drawing_tell_an_observer_and_nobody_else() {
    alone("observer::a_training_and_a_drawing_tell_an_observer_and_nobody_else", train_and_draw);
}

fn train_and_draw() {
    pin_threads();
    let scratch = tempfile::tempdir().unwrap();
    let run = scratch.path().join("run");
    let stopping = Collector { stop_after: Some(2), ..Collector::default() };
    let watching = Collector::default();
    let heard = written_by(|| eprintln!("a word"));
    assert_eq!(heard, "a word\n", "what is written is seen");
    let written = written_by(|| {
        let error = train(config(&run), None, &stopping).map(drop).unwrap_err();
        assert!(matches!(&error.kind, ErrorKind::Interrupted(why) if why.contains("step 2")), "{error}");
        let outcome = train(config(&run), Some(&Resume::Latest), &watching).unwrap();
        assert_eq!(outcome.steps, 4);
        let model = StableDiffusion::load(&tiny_sd(), Kind::Float, Device::Cpu).unwrap();
        let settings =
            SampleSettings::square(&model, "a cat face", Some(SamplerKind::Ddim), 2, 4.0, 64).unwrap();
        let mut session = Session::open(model, Vec::new(), None).unwrap();
        let stopped = Collector { stop_after: Some(0), ..Collector::default() };
        let request = Request::new(&settings, &[7], 1);
        let drawn = session.draw(&request, &watching);
        assert_eq!(drawn.unwrap().len(), 1);
        let drawn = session.draw(&request, &stopped);
        assert!(matches!(drawn.map(drop), Err(Error { kind: ErrorKind::Interrupted(_), .. })));
    });
    assert_eq!(written, "", "the library wrote to the terminal");

    assert!(stopping.heard("class pictures: 2 made") && stopping.heard("Started { what: \"training\""));
    assert!(watching.heard("resuming after step 2") && watching.heard("Finished { what: \"training\" }"));
    assert_eq!((stopping.losses.lock().unwrap().len(), watching.losses.lock().unwrap().len()), (2, 2));
    let pictures = [stopping.pictures, watching.pictures].map(|pictures| pictures.into_inner().unwrap());
    assert_eq!(pictures.each_ref().map(Vec::len), [3, 1], "two class pictures and a sheet of previews each");
    assert!(pictures.iter().flatten().all(|path| path.is_file()), "{pictures:?}");
}
