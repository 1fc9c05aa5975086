//! The list of scores: what their keys mean.

use std::collections::BTreeMap;

/// Scores by key, see [`SCORES`].
pub type Scores = BTreeMap<String, f64>;

/// Which way a score is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Better {
    /// More is better.
    Higher,
    /// Less is better.
    Lower,
    /// Neither; it depends on what is wanted.
    Neither,
}

/// What a key of [`Scores`] means.
#[derive(Debug, Clone, Copy)]
pub struct ScoreKind {
    /// Its key in records and its column in CSV files.
    pub key: &'static str,
    /// Its heading in tables.
    pub title: &'static str,
    /// Which way it is better.
    pub better: Better,
    /// One sentence for readers of the report.
    pub about: &'static str,
}

/// Every score, in the order of tables.
pub const SCORES: [ScoreKind; 27] = [
    score(
        "dino",
        "DINO",
        Better::Higher,
        "mean cosine of DINO ViT class tokens to the subject's test pictures, or the pair's own picture",
    ),
    score(
        "dinov2",
        "DINOv2",
        Better::Higher,
        "mean cosine of DINOv2 class tokens to the subject's test pictures, or the pair's own picture",
    ),
    score(
        "clip_i",
        "CLIP-I",
        Better::Higher,
        "mean cosine of CLIP picture embeddings to the subject's test pictures, or the pair's own picture",
    ),
    score(
        "clip_t",
        "CLIP-T",
        Better::Higher,
        "cosine of the CLIP embeddings of picture and prompt; a rare token is left out of the prompt",
    ),
    score(
        "lpips_vgg",
        "LPIPS",
        Better::Neither,
        "mean LPIPS distance (VGG) to the subject's test pictures, or the pair's own picture",
    ),
    score(
        "lpips_alex",
        "LPIPS Alex",
        Better::Neither,
        "mean LPIPS distance (AlexNet) to the subject's test pictures, or the pair's own picture",
    ),
    score(
        "diversity_vgg",
        "diversity",
        Better::Higher,
        "mean LPIPS distance (VGG) between the pictures of one prompt",
    ),
    score(
        "diversity_alex",
        "diversity Alex",
        Better::Higher,
        "mean LPIPS distance (AlexNet) between the pictures of one prompt",
    ),
    score(
        "diversity_clip",
        "diversity CLIP",
        Better::Higher,
        "1 - mean cosine of CLIP embeddings between the pictures of one prompt",
    ),
    score(
        "drift",
        "drift",
        Better::Lower,
        "mean absolute difference of pixels (0 to 255) from the base model's pictures of unrelated prompts and the same noise",
    ),
    score(
        "drift_clip",
        "drift CLIP",
        Better::Lower,
        "1 - cosine of CLIP embeddings to the base model's pictures of unrelated prompts and the same noise",
    ),
    score(
        "identity_top1",
        "identity top-1",
        Better::Higher,
        "share of pictures whose nearest real picture is the subject's and not a look-alike's",
    ),
    score(
        "identity_map",
        "identity mAP",
        Better::Higher,
        "mean average precision of the subject's pictures among the look-alikes' for each drawn picture",
    ),
    score(
        "subject_clip_i",
        "CLIP-I subject",
        Better::Higher,
        "CLIP-I to the test pictures with their background covered (masks)",
    ),
    score(
        "background_clip_i",
        "CLIP-I background",
        Better::Lower,
        "CLIP-I to the test pictures with the subject covered: how much of the background was learned (masks)",
    ),
    score(
        "subject_dino",
        "DINO subject",
        Better::Higher,
        "DINO to the test pictures with their background covered (masks)",
    ),
    score(
        "background_dino",
        "DINO background",
        Better::Lower,
        "DINO to the test pictures with the subject covered (masks)",
    ),
    score(
        "held_out_loss",
        "held-out loss",
        Better::Lower,
        "denoising error on pictures that were not trained on, with fixed noise",
    ),
    score(
        "edge_f1",
        "edge F1",
        Better::Higher,
        "F1 of the picture's Canny edges and those of the picture that its condition was made of",
    ),
    score(
        "edge_iou",
        "edge IoU",
        Better::Higher,
        "intersection over union of the picture's Canny edges and those of the picture that its condition was made of",
    ),
    score(
        "edge_f1_shuffled",
        "shuffled edge F1",
        Better::Neither,
        "edge F1 of a picture drawn with another pair's condition, with the edges of its own pair's picture: what agreement is \
         left where the condition has no part in it",
    ),
    score(
        "subject_miou",
        "subject mIoU",
        Better::Higher,
        "mean IoU of subject and background, told apart by the colour of the picture's border, with the segmentation map",
    ),
    score(
        "subject_miou_shuffled",
        "shuffled subject mIoU",
        Better::Neither,
        "subject mIoU of a picture drawn with another pair's condition, with its own pair's map: what agreement is left where \
         the condition has no part in it",
    ),
    score(
        "seg_miou",
        "segmentation mIoU",
        Better::Higher,
        "mean over classes of the IoU of predicted and true segmentation, over all pictures together",
    ),
    score(
        "seg_macc",
        "segmentation mAcc",
        Better::Higher,
        "mean over classes of the share of their pixels that is predicted right, over all pictures together",
    ),
    score(
        "seg_aacc",
        "segmentation aAcc",
        Better::Higher,
        "share of all pixels whose class is predicted right",
    ),
    score(
        "landmark_error",
        "landmark error",
        Better::Lower,
        "mean distance in pixels between predicted and true landmarks; pictures without a prediction are left out",
    ),
];

/// Scores of one picture and its own condition: their mean is over all pictures, whatever the prompts.
pub const OF_CONDITIONS: [&str; 6] =
    ["edge_f1", "edge_iou", "edge_f1_shuffled", "subject_miou", "subject_miou_shuffled", "landmark_error"];

const fn score(key: &'static str, title: &'static str, better: Better, about: &'static str) -> ScoreKind {
    ScoreKind { key, title, better, about }
}
