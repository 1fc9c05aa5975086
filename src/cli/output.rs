//! The folder that `hra sample` draws into, and what it does not write over.

use crate::data::image::png;
use crate::diffusion::sample::Picture;
use crate::error::{Error, Result};
use crate::platform::files;
use std::collections::HashSet;
use std::path::{Path, PathBuf};

/// The folder that pictures go into.
pub struct Output<'a> {
    /// Where it is.
    pub dir: &'a Path,
    /// What the pictures of a prompt are called, where it is not the prompt's number.
    pub names: Option<Vec<String>>,
    /// Pictures of each prompt.
    pub count: usize,
}

impl Output<'_> {
    /// Makes the folder. Pictures that hra drew there before are replaced only where `overwrite` says so, and then those of the
    /// base model too, which would not belong to the new ones; any other file of that name is not touched. `read` are files
    /// that are read, which are none to write over whoever made them.
    pub fn prepare(
        &self,
        (with_base, overwrite): (bool, bool),
        prompts: usize,
        read: &[PathBuf],
    ) -> Result<()> {
        let read: HashSet<PathBuf> = read.iter().filter_map(|path| path.canonicalize().ok()).collect();
        let of = |base: bool| {
            let pictures = (0..prompts).flat_map(|p| (0..self.count).map(move |i| (p, i)));
            pictures.map(move |(prompt, picture)| self.file(prompt, picture, base))
        };
        let written = of(false).chain([self.dir.join("grid.png")]).chain(of(true).filter(|_| with_base));
        let mut earlier = Vec::new();
        for path in written.filter(|path| path.exists()) {
            self.refuse(&path, &read)?;
            earlier.push(path);
        }
        let of_base = of(true).filter(|path| !with_base && is_ours(path));
        let stale: Vec<PathBuf> = of_base.collect();
        if let (false, Some(first)) = (overwrite, earlier.iter().chain(&stale).next()) {
            let problem = format!("--output: {} is there, drawn before", first.display());
            return Err(
                Error::run(problem).with_hint("give another --output, or --overwrite to draw in its place")
            );
        }
        stale.iter().try_for_each(|path| files::remove_file(path))?;
        for base in if with_base { &[false, true][..] } else { &[false] } {
            files::create_dir_all(&self.folder(*base))?;
        }
        let own: HashSet<PathBuf> =
            (0..prompts).flat_map(|p| (0..self.count).map(move |i| self.file(p, i, false))).collect();
        let is_other = |path: &Path| {
            path.extension().is_some_and(|e| e == "png") && !own.contains(path) && !path.ends_with("grid.png")
        };
        let others = files::list_dir(self.dir)?.iter().filter(|entry| is_other(&entry.path)).count();
        if others > 0 {
            eprintln!("note: {} holds {others} other pictures, which stay there", self.dir.display());
        }
        Ok(())
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

    /// The picture's path.
    pub fn file(&self, prompt: usize, picture: usize, base: bool) -> PathBuf {
        let name = match &self.names {
            None => format!("{prompt:04}-{picture:04}.png"),
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
