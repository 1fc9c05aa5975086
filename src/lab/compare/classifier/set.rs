//! The classifier's pictures, looked at and copied into the comparison's folder.

use crate::data::image::Background;
use crate::data::pairs::{ConditionKind, PairFolder, PairSettings};
use crate::error::{Error, Result};
use crate::lab::compare::classifier::entry::ClassifierEntry;
use crate::lab::compare::subject::{Subject, SubjectPicture, copy_pictures};
use crate::lab::results::{CLASSIFIER_PICTURES, ClassifiedPicture};
use crate::platform::files;
use crate::platform::observer::Observer;
use std::collections::BTreeSet;
use std::path::Path;

/// So many captions are listed where none is a class.
const LISTED: usize = 5;

/// Pictures of the classes, looked at.
#[derive(Debug, Clone)]
pub struct ClassifierSet {
    /// Behind transparent parts.
    pub background: Background,
    /// In the order of the classes, then of the table.
    pictures: Vec<SubjectPicture>,
    /// Of each the number of its class.
    classes: Vec<usize>,
}

impl ClassifierSet {
    /// Reads the table and the pictures of the classes. Errors: a class without a picture, a picture that is trained on.
    pub fn resolve(
        entry: &ClassifierEntry,
        background: Background,
        subjects: &[Subject],
        observer: &dyn Observer,
    ) -> Result<Self> {
        let settings = PairSettings {
            // Made of the pictures they need no column, and nobody looks at them.
            condition: ConditionKind::Canny,
            make_conditions: true,
            strict_paths: entry.strict_paths,
            background,
            ..PairSettings::default()
        };
        let folder = PairFolder::read(&entry.data_dir, &settings, observer)
            .map_err(|e| e.at("classifier: data_dir"))?;
        if let Some(first) = folder.bad().first() {
            observer.note(&format!(
                "classifier: data_dir: rows of the table that cannot be used are left out, {} of them; the first: {}: {}",
                folder.bad().len(),
                first.name,
                first.reason
            ));
        }
        let mut set = Self { background, pictures: Vec::new(), classes: Vec::new() };
        let mut missing = Vec::new();
        for (class, prompt) in entry.prompts.iter().enumerate() {
            let own = folder.pairs().iter().filter(|pair| pair.caption == *prompt);
            let before = set.pictures.len();
            for pair in own.take(entry.num_pictures.unwrap_or(usize::MAX)) {
                let ending = pair.image.extension().and_then(|e| e.to_str()).unwrap_or("png");
                let name = format!("{:05}.{ending}", set.pictures.len());
                let picture = SubjectPicture::read(name, &pair.image)?;
                no_training_picture(&picture, &pair.name, subjects)?;
                set.pictures.push(picture);
                set.classes.push(class);
            }
            if set.pictures.len() == before {
                missing.push(format!("`{prompt}`"));
            }
        }
        if missing.is_empty() {
            return Ok(set);
        }
        let captions: BTreeSet<&str> = folder.pairs().iter().map(|pair| pair.caption.as_str()).collect();
        let some: Vec<String> = captions.iter().take(LISTED).map(|caption| format!("`{caption}`")).collect();
        Err(Error::data(format!(
            "classifier: prompts: expected a picture for each class in {}, found none with the caption {}",
            entry.data_dir.display(),
            missing.join(", ")
        ))
        .with_hint(format!(
            "a class is the whole caption of its pictures; the table has {} captions, such as {}",
            captions.len(),
            some.join(", ")
        )))
    }

    /// The pictures as readers of the plan find them.
    pub fn pictures(&self) -> Vec<ClassifiedPicture> {
        let picture = |(picture, class): (&SubjectPicture, &usize)| ClassifiedPicture {
            file: format!("{CLASSIFIER_PICTURES}/{}", picture.name),
            class: *class,
        };
        self.pictures.iter().zip(&self.classes).map(picture).collect()
    }

    /// Hashes of the pictures' pixels, with their classes.
    pub fn identity(&self) -> Vec<(&str, usize)> {
        self.pictures.iter().map(|p| p.hash.as_str()).zip(self.classes.iter().copied()).collect()
    }

    /// Copies the pictures into the comparison's folder.
    pub fn copy_into(&self, comparison: &Path) -> Result<()> {
        let folder = comparison.join(CLASSIFIER_PICTURES);
        files::create_dir_all(&folder)?;
        copy_pictures(&self.pictures, &folder)
    }
}

/// Refuses a picture that a subject is taught with.
fn no_training_picture(picture: &SubjectPicture, name: &str, subjects: &[Subject]) -> Result<()> {
    for subject in subjects {
        let own = subject.pictures().map(|own| own.train.as_slice()).unwrap_or_default();
        if let Some(twin) = own.iter().find(|other| other.hash == picture.hash) {
            return Err(Error::data(format!(
                "classifier: data_dir: {name} is trained on too, as {} of subject `{}`; the classes are to be others than what is \
                 taught",
                twin.name, subject.name
            )));
        }
    }
    Ok(())
}
