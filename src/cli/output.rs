//! The folder that `hra sample` draws into, and what it does not write over.

use crate::data::image::png;
use crate::diffusion::sample::Picture;
use crate::error::{Error, Result};
use crate::platform::files;
use crate::platform::observer::Observer;
use std::collections::HashSet;
use std::path::{Path, PathBuf};

/// The folder that pictures go into.
pub struct Output<'a> {
    dir: &'a Path,
    /// What the pictures of a prompt are called, where it is not the prompt's number.
    names: Option<Vec<String>>,
    /// Pictures of each prompt.
    count: usize,
    /// The first prompt's number.
    first: usize,
}

impl<'a> Output<'a> {
    /// A folder for `count` pictures of each prompt, called by numbers or by `names`.
    pub fn new(dir: &'a Path, names: Option<Vec<String>>, count: usize) -> Self {
        Self { dir, names, count, first: 0 }
    }

    /// Makes the folder. Nothing that is there is lost: numbers go on after those of earlier pictures, and names that are taken
    /// are refused. With `overwrite` pictures that hra drew are replaced, and those of the base model too, which would not
    /// belong to the new ones; any other file of that name is not touched. `read` are files that are read, which are none to
    /// write over whoever made them.
    pub fn prepare(
        &mut self,
        (with_base, overwrite): (bool, bool),
        prompts: usize,
        read: &[PathBuf],
        observer: &dyn Observer,
    ) -> Result<()> {
        let read: HashSet<PathBuf> = read.iter().filter_map(|path| path.canonicalize().ok()).collect();
        if !overwrite && self.names.is_none() {
            self.first = self.next_number()?;
        }
        if self.first > 0 {
            let (dir, first) = (self.dir.display(), self.first);
            observer.note(&format!(
                "{dir} has pictures: the new ones are counted on from {first:04} (--overwrite draws in their place)"
            ));
        }
        let of = |base| self.files(prompts, base);
        let written =
            of(false).into_iter().chain([self.sheet()]).chain(of(true).into_iter().filter(|_| with_base));
        for path in written.filter(|path| path.exists()) {
            self.refuse(&path, &read)?;
            if !overwrite {
                let problem = format!("--output: {} is there, drawn before", path.display());
                return Err(Error::run(problem)
                    .with_hint("give another --output, or --overwrite to draw in its place"));
            }
        }
        if overwrite && !with_base {
            of(true).iter().filter(|path| is_ours(path)).try_for_each(|path| files::remove_file(path))?;
        }
        for base in if with_base { &[false, true][..] } else { &[false] } {
            files::create_dir_all(&self.folder(*base))?;
        }
        Ok(())
    }

    /// One more than the largest number of a prompt that hra drew a picture of.
    fn next_number(&self) -> Result<usize> {
        let number = |name: &str| {
            let (prompt, picture) = name.strip_suffix(".png")?.split_once('-')?;
            let digits = |text: &str| text.len() >= 4 && text.bytes().all(|b| b.is_ascii_digit());
            (digits(prompt) && digits(picture)).then(|| prompt.parse::<usize>().ok()).flatten()
        };
        let mut next = 0;
        for folder in [self.folder(false), self.folder(true)].iter().filter(|folder| folder.is_dir()) {
            let entries = files::list_dir(folder)?;
            let pictures =
                entries.iter().filter_map(|entry| Some((number(entry.name.to_str()?)?, &entry.path)));
            let mut pictures: Vec<(usize, &PathBuf)> = pictures.collect();
            pictures.sort_by_key(|(number, _)| std::cmp::Reverse(*number));
            let last = pictures.into_iter().find(|(_, path)| is_ours(path));
            next = next.max(last.map_or(0, |(number, _)| number.saturating_add(1)));
        }
        Ok(next)
    }

    /// Refuses a path that is not to be written over.
    fn refuse(&self, path: &Path, read: &HashSet<PathBuf>) -> Result<()> {
        let problem = if path.canonicalize().is_ok_and(|path| read.contains(&path)) {
            "a picture of this name would be written over one that is read"
        } else if !is_ours(path) {
            "a file that hra did not draw is in the way"
        } else {
            return Ok(());
        };
        Err(Error::run(format!("{}: {problem}", path.display())).with_hint("give another --output"))
    }

    fn folder(&self, base: bool) -> PathBuf {
        if base { self.dir.join("base") } else { self.dir.to_path_buf() }
    }

    /// The paths of all pictures.
    fn files(&self, prompts: usize, base: bool) -> Vec<PathBuf> {
        let of_prompt = |prompt| (0..self.count).map(move |picture| self.file(prompt, picture, base));
        (0..prompts).flat_map(of_prompt).collect()
    }

    /// The contact sheet's path.
    pub fn sheet(&self) -> PathBuf {
        match self.first {
            0 => self.dir.join("grid.png"),
            first => self.dir.join(format!("grid-{first:04}.png")),
        }
    }

    /// The picture's path.
    pub fn file(&self, prompt: usize, picture: usize, base: bool) -> PathBuf {
        let number = self.first + prompt;
        let name = match &self.names {
            None => format!("{number:04}-{picture:04}.png"),
            Some(names) if self.count == 1 => format!("{}.png", names[prompt]),
            Some(names) => format!("{}-{picture:04}.png", names[prompt]),
        };
        self.folder(base).join(name)
    }

    /// Writes the pictures of a prompt, each with its texts.
    pub fn save(
        &self,
        prompt: usize,
        pictures: &[Picture],
        base: bool,
        text: &dyn Fn(Option<u64>) -> Vec<(String, String)>,
    ) -> Result<()> {
        for (i, picture) in pictures.iter().enumerate() {
            png::save_png(&self.file(prompt, i, base), &picture.image, &text(picture.seed))?;
        }
        Ok(())
    }
}

/// Whether `hra sample` drew a picture; `hra prepare` names the software too, but no seed.
fn is_ours(path: &Path) -> bool {
    let drawn = |text: Vec<(String, String)>| {
        ["software", "seed"].iter().all(|key| text.iter().any(|(k, _)| k == key))
    };
    png::read_png_text(path).is_ok_and(drawn)
}
