//! The tensors of one model part by today's names, wherever they lie: in a folder's file or shards, or in a checkpoint.

use crate::error::{Error, Result};
use crate::platform::files;
use crate::weights::ldm::{LdmNames, TensorForm};
use crate::weights::part::Part;
use crate::weights::tensor_file::{self, TensorFile};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tch::{Kind, Tensor};

/// The tensors of one part, open for reading.
#[derive(Debug)]
pub struct Tensors {
    place: PathBuf,
    files: Vec<Arc<TensorFile>>,
    index: BTreeMap<String, TensorEntry>,
    problems: Vec<String>,
    unknown: Vec<String>,
    /// How the names begin that are there by custom and that no network asks for.
    spare: Option<String>,
}

#[derive(Debug)]
struct TensorEntry {
    file: usize,
    key: String,
    form: TensorForm,
}

impl Tensors {
    /// Opens the weights in the folder `dir`: `stem.safetensors`, its fp16 variant, or the index of its shards. `current_name`
    /// gives today's name of a key that had another one.
    pub(super) fn in_folder(
        dir: &Path,
        stem: &str,
        current_name: impl Fn(&str) -> Option<String>,
    ) -> Result<Self> {
        let mut tensors = Self::empty(dir);
        for path in find_files(dir, stem)? {
            tensors.add(Arc::new(TensorFile::open(&path)?), &current_name);
        }
        Ok(tensors)
    }

    /// All of one file, as [`Self::in_folder`].
    pub(super) fn in_file(file: &Arc<TensorFile>, current_name: impl Fn(&str) -> Option<String>) -> Self {
        let mut tensors = Self::empty(file.path());
        tensors.add(file.clone(), &current_name);
        tensors
    }

    fn add(&mut self, file: Arc<TensorFile>, current_name: &impl Fn(&str) -> Option<String>) {
        for key in file.names() {
            let name = current_name(&key).unwrap_or_else(|| key.clone());
            self.insert(name, TensorEntry { file: self.files.len(), key, form: TensorForm::Same });
        }
        self.files.push(file);
    }

    /// The part of a checkpoint whose names these are. What lies below `spare` is never called unused.
    pub(super) fn in_checkpoint(file: &Arc<TensorFile>, names: &LdmNames, spare: Option<String>) -> Self {
        let mut tensors = Self { spare, ..Self::empty(file.path()) };
        tensors.files.push(file.clone());
        let is_clip = names.prefix().ends_with(".transformer.");
        for key in file.names().into_iter().filter(|key| key.starts_with(names.prefix())) {
            // Some files leave CLIP's inner prefix out, as transformers 5 does.
            let clip = key.strip_prefix(names.prefix()).filter(|k| is_clip && !k.starts_with("text_"));
            let usual = clip.map(|rest| format!("{}text_model.{rest}", names.prefix()));
            let found = names.tensors(usual.as_ref().unwrap_or(&key));
            if found.is_empty() && !is_by_custom(&key) {
                tensors.unknown.push(key.clone());
            }
            for (name, form) in found {
                let shape = file.shape(&key).unwrap_or_default();
                let fits = match form {
                    TensorForm::Same => true,
                    TensorForm::Third(_) => shape.first().is_some_and(|rows| rows % 3 == 0),
                    TensorForm::Transposed => shape.len() == 2,
                };
                if fits {
                    tensors.insert(name, TensorEntry { file: 0, key: key.clone(), form });
                } else if !matches!(form, TensorForm::Third(1 | 2)) {
                    let expected =
                        if form == TensorForm::Transposed { "a matrix" } else { "rows in three equal parts" };
                    tensors.problems.push(format!("`{key}`: expected {expected}, found {shape:?}"));
                }
            }
        }
        tensors
    }

    fn empty(place: &Path) -> Self {
        Self {
            place: place.to_path_buf(),
            files: Vec::new(),
            index: BTreeMap::new(),
            problems: Vec::new(),
            unknown: Vec::new(),
            spare: None,
        }
    }

    fn insert(&mut self, name: String, entry: TensorEntry) {
        let key = entry.key.clone();
        if let Some(TensorEntry { key: other, .. }) = self.index.insert(name.clone(), entry) {
            self.problems.push(format!("`{name}` is there twice, as `{other}` and `{key}`"));
        }
    }

    /// The folder or checkpoint, for messages.
    pub fn place(&self) -> &Path {
        &self.place
    }

    /// What is wrong with the names alone.
    pub fn problems(&self) -> &[String] {
        &self.problems
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.index.keys().map(String::as_str)
    }

    /// Whether this tensor is there by custom, for no network that we know to ask for it.
    pub fn is_spare(&self, name: &str) -> bool {
        self.spare.as_ref().is_some_and(|spare| name.starts_with(spare.as_str()))
    }

    /// Keys of this part that have no name today.
    pub fn unknown(&self) -> &[String] {
        &self.unknown
    }

    /// The key under which the file has a tensor.
    pub fn key(&self, name: &str) -> Option<&str> {
        self.index.get(name).map(|entry| entry.key.as_str())
    }

    /// Shape of a tensor, if it is there.
    pub fn shape(&self, name: &str) -> Option<Vec<i64>> {
        let entry = self.index.get(name)?;
        let mut shape = self.files[entry.file].shape(&entry.key)?;
        match entry.form {
            TensorForm::Same => {}
            TensorForm::Third(_) => shape[0] /= 3,
            TensorForm::Transposed => shape.reverse(),
        }
        Some(shape)
    }

    /// Whether a tensor holds floating-point numbers that can be converted.
    pub fn is_float(&self, name: &str) -> bool {
        self.index.get(name).is_some_and(|entry| self.files[entry.file].is_float(&entry.key))
    }

    /// The kind of number that a tensor holds, if libtorch has it.
    pub fn kind(&self, name: &str) -> Option<Kind> {
        self.index.get(name).and_then(|entry| self.files[entry.file].kind(&entry.key))
    }

    /// The dtype's name in the file, for messages.
    pub fn dtype(&self, name: &str) -> String {
        self.index.get(name).map(|entry| self.files[entry.file].dtype(&entry.key)).unwrap_or_default()
    }

    /// What identifies the weights of this part: each one's name, dtype and first 64 values, whatever the layout.
    pub fn identify(&self, hash: &mut Sha256) -> Result<()> {
        let constant = |name: &str| name.ends_with("position_ids") || name.starts_with("text_projection");
        for (name, TensorEntry { file, key, form }) in &self.index {
            if constant(name) || self.is_spare(name) {
                continue;
            }
            let (i, n) = if let TensorForm::Third(i) = form { (*i, 3) } else { (0, 1) };
            let file = &self.files[*file];
            hash.update(format!("{name}:{}\n", file.dtype(key)));
            let size = file.kind(key).map_or(1, |kind| kind.elt_size_in_bytes());
            hash.update(file.first_bytes(key, i, n, 64 * size)?);
        }
        Ok(())
    }

    /// Reads one tensor, on the CPU, in the file's kind.
    pub fn read(&self, name: &str) -> Result<Tensor> {
        let entry = self.index.get(name).ok_or_else(|| {
            Error::format(&self.place, format!("expected a tensor `{name}`, found none of that name"))
        })?;
        let file = &self.files[entry.file];
        Ok(match entry.form {
            TensorForm::Same => file.read(&entry.key)?,
            TensorForm::Third(i) => file.read_rows(&entry.key, i, 3)?,
            // In a folder's order of numbers, so that it multiplies to the same last bits.
            TensorForm::Transposed => file.read(&entry.key)?.f_tr()?.f_contiguous()?,
        })
    }
}

/// Today's name of a key in a folder's file; `None` if it is the same.
pub(super) fn current_name(part: Part, key: &str) -> Option<String> {
    match part {
        Part::UNet => None,
        Part::Vae => current_vae_name(key),
        // Files of transformers 4 have the prefix, those of 5 do not.
        Part::TextEncoder | Part::TextEncoder2 => key.strip_prefix("text_model.").map(str::to_string),
    }
}

/// Attention of the 2022 layout (`query`, `key`, `value`, `proj_attn`) by today's names.
pub fn current_vae_name(key: &str) -> Option<String> {
    const RULES: [(&str, &str); 4] =
        [(".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."), (".proj_attn.", ".to_out.0.")];
    RULES.iter().find(|(old, _)| key.contains(old)).map(|(old, new)| key.replace(old, new))
}

/// Whether checkpoints have this key of a part for other uses than drawing pictures.
fn is_by_custom(key: &str) -> bool {
    let end = key.rsplit('.').next().unwrap_or(key);
    key.starts_with("first_stage_model.loss.") || ["logit_scale", "attn_mask", "position_ids"].contains(&end)
}

/// The files that hold the weights of `dir`, in the order of preference that diffusers has.
fn find_files(dir: &Path, stem: &str) -> Result<Vec<PathBuf>> {
    for name in [format!("{stem}.safetensors"), format!("{stem}.fp16.safetensors")] {
        let path = dir.join(name);
        if path.is_file() {
            return Ok(vec![path]);
        }
    }
    let indexes = ["safetensors.index.json", "safetensors.index.fp16.json", "fp16.safetensors.index.json"];
    for name in indexes.map(|end| format!("{stem}.{end}")) {
        let path = dir.join(name);
        if path.is_file() {
            return shards(dir, &path);
        }
    }
    let found: Vec<String> =
        files::list_dir(dir)?.iter().map(|entry| entry.name.to_string_lossy().into_owned()).collect();
    let pickled = found.iter().any(|n| n.ends_with(".bin") || n.ends_with(".ckpt"));
    let hint = pickled.then_some(
        "only safetensors files are read; convert with Python's `save_pretrained(.., safe_serialization=True)`",
    );
    Err(Error::format(dir, format!("expected {stem}.safetensors, found {}", tensor_file::list(&found)))
        .with_hints(hint))
}

/// The shard files that an index names. A shard is a plain file name: an index must not lead out of its folder.
fn shards(dir: &Path, index: &Path) -> Result<Vec<PathBuf>> {
    let value: serde_json::Value = serde_json::from_str(&files::read_to_string(index)?)
        .map_err(|e| Error::format(index, format!("not an index of shards: {e}")))?;
    let map = value["weight_map"].as_object();
    let map = map.ok_or_else(|| Error::format(index, "expected an object `weight_map`, found none"))?;
    let mut names: Vec<&str> = map.values().filter_map(|v| v.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    if let Some(bad) = names.iter().find(|n| Path::new(n).file_name() != Some(n.as_ref())) {
        return Err(Error::format(index, format!("expected plain file names of shards, found `{bad}`")));
    }
    Ok(names.into_iter().map(|n| dir.join(n)).collect())
}

#[cfg(test)]
mod tests {
    use super::current_vae_name;

    #[test]
    fn old_attention_names_become_todays_and_others_stay() {
        let old = "decoder.mid_block.attentions.0.proj_attn.weight";
        assert_eq!(current_vae_name(old).as_deref(), Some("decoder.mid_block.attentions.0.to_out.0.weight"));
        assert_eq!(
            current_vae_name("encoder.mid_block.attentions.0.key.bias").as_deref(),
            Some("encoder.mid_block.attentions.0.to_k.bias")
        );
        assert_eq!(current_vae_name("encoder.conv_in.weight"), None);
    }
}
