//! A subject of a comparison, or a set of pairs in its place: what is trained on, drawn from and measured with.

use crate::data::image::decode::MAX_FILE_BYTES;
use crate::data::image::load_rgb;
use crate::error::Result;
use crate::lab::compare::control::set::ControlSet;
use crate::platform::files;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};

/// A prompt as it is drawn, and as CLIP reads it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prompt {
    /// With the rare token.
    pub prompt: String,
    /// Without it (protocol `paper`: with it).
    pub text: String,
}

/// A picture of the user's: where it is, and what is in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubjectPicture {
    /// Name of the file.
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
    /// Of its pixels.
    pub hash: String,
}

impl SubjectPicture {
    /// Looks into a file.
    pub fn read(name: String, path: &Path) -> Result<Self> {
        let pixels = load_rgb(path)?;
        let size = [pixels.width().to_le_bytes(), pixels.height().to_le_bytes()].concat();
        let hash = hash(&[&size, pixels.as_raw()].map(|part| &part[..]).concat());
        Ok(Self { name, path: path.to_path_buf(), hash })
    }
}

/// A subject, resolved; or a set of pairs, whose captions are the prompts.
#[derive(Debug, Clone)]
pub struct Subject {
    /// Its name.
    pub name: String,
    /// What it is one of; of pairs, what their conditions are.
    pub class: String,
    /// For the tables.
    pub prompts: Vec<Prompt>,
    /// To choose by.
    pub validation_prompts: Vec<Prompt>,
    /// What a reader must know of it.
    pub notes: Vec<String>,
    /// What it is taught and measured with.
    pub material: Material,
}

/// What a subject is taught and measured with.
#[derive(Debug, Clone)]
pub enum Material {
    /// Pictures of it.
    Pictures(SubjectPictures),
    /// Pairs of picture and condition: control is taught.
    Pairs(ControlSet),
}

/// The pictures of a subject, by what they are for.
#[derive(Debug, Clone, Default)]
pub struct SubjectPictures {
    /// What it is trained with.
    pub instance_prompt: String,
    /// What class pictures are drawn with.
    pub class_prompt: String,
    /// Trained on.
    pub train: Vec<SubjectPicture>,
    /// Seen by validation only; may be empty.
    pub validation: Vec<SubjectPicture>,
    /// Seen by the tables only.
    pub test: Vec<SubjectPicture>,
    /// Others of its class; empty where the class pictures take their place.
    pub look_alikes: Vec<SubjectPicture>,
    /// Where the subject is in each of [`Self::test`].
    pub masks: Vec<SubjectPicture>,
}

impl SubjectPictures {
    /// Every kind of picture with the folder it has in `subjects/NAME/`.
    pub fn by_kind(&self) -> [(&'static str, &[SubjectPicture]); 5] {
        [
            ("train", &self.train),
            ("validation", &self.validation),
            ("test", &self.test),
            ("look_alikes", &self.look_alikes),
            ("masks", &self.masks),
        ]
    }

    /// Copies them into the subject's folder.
    fn copy_into(&self, subject: &Path) -> Result<()> {
        for (kind, pictures) in self.by_kind() {
            let folder = subject.join(kind);
            if pictures.is_empty() {
                files::remove_dir_all(&folder)?;
            } else if folder.is_dir() {
                // What an earlier plan put there and this one does not; hidden files are another worker's, half written.
                for entry in files::list_dir(&folder)? {
                    let name = entry.name.to_string_lossy();
                    if !name.starts_with('.') && !pictures.iter().any(|p| p.name == name) {
                        files::remove_file(&entry.path)?;
                    }
                }
            } else {
                files::create_dir_all(&folder)?;
            }
            copy_pictures(pictures, &folder)?;
        }
        Ok(())
    }
}

/// Copies pictures into a folder, under their names; those that are there as they are stay untouched.
pub fn copy_pictures(pictures: &[SubjectPicture], folder: &Path) -> Result<()> {
    for picture in pictures {
        let to = folder.join(&picture.name);
        let bytes = files::read(&picture.path, MAX_FILE_BYTES)?;
        if !to.is_file() || files::read(&to, MAX_FILE_BYTES)? != bytes {
            files::write_atomic(&to, &bytes)?;
        }
    }
    Ok(())
}

impl Subject {
    /// Its pairs, where control is taught.
    pub fn pairs(&self) -> Option<&ControlSet> {
        match &self.material {
            Material::Pairs(pairs) => Some(pairs),
            Material::Pictures(_) => None,
        }
    }

    /// Its pictures, where it has any of its own.
    pub fn pictures(&self) -> Option<&SubjectPictures> {
        match &self.material {
            Material::Pictures(pictures) => Some(pictures),
            Material::Pairs(_) => None,
        }
    }

    /// Copies what it is taught and measured with into the comparison's folder.
    pub fn copy_into(&self, comparison: &Path) -> Result<()> {
        let folder = comparison.join("subjects").join(&self.name);
        match &self.material {
            Material::Pictures(pictures) => pictures.copy_into(&folder),
            Material::Pairs(pairs) => pairs.copy_into(&folder),
        }
    }
}

/// SHA-256 in hexadecimal.
pub fn hash(bytes: &[u8]) -> String {
    files::hex(Sha256::digest(bytes))
}

/// A name for folders: lower case, digits and single hyphens.
pub fn slug(text: &str) -> String {
    let mut slug = String::new();
    for c in text.to_lowercase().chars() {
        if c.is_ascii_alphanumeric() || c == '.' && !slug.is_empty() {
            slug.push(c);
        } else if !slug.is_empty() && !slug.ends_with('-') {
            slug.push('-');
        }
    }
    let slug: String = slug.trim_matches(['-', '.']).chars().take(60).collect();
    if slug.is_empty() { "x".into() } else { slug }
}
