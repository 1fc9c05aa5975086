//! Second names of settings, and what happens where a setting is not set.

/// Names of other programs, with underscores, beside the settings that they stand for.
pub const SECOND_NAMES: &[(&str, &str)] = &[
    ("model", "pretrained_model_name_or_path"),
    ("output", "output_dir"),
    ("mixed_precision", "dtype"),
    ("hra_r", "rank"),
    ("oft_block_size", "block_size"),
    ("boft_block_size", "block_size"),
    ("eps", "coft_eps"),
    ("oft_eps", "coft_eps"),
    ("lambda", "hra_lambda"),
    ("apply_gs", "gram_schmidt"),
    ("apply_GS", "gram_schmidt"),
    ("hra_apply_gs", "gram_schmidt"),
    ("hra_apply_GS", "gram_schmidt"),
    ("hra_bias", "bias"),
    ("lora_bias", "bias"),
    ("learning_rate_text", "text_encoder_lr"),
];

/// Settings that may be left out, and what happens then.
pub const UNSET: &[(&str, &str)] = &[
    ("model_config", "not used"),
    ("threads", "libtorch's choice"),
    ("resolution", "what the model was trained at"),
    ("held_out_data_dir", "not used"),
    ("train_data_dir", "not used"),
    ("palette", "not used"),
    ("control_lr", "that of the UNet"),
    ("class_data_dir", "class_images in the run folder"),
    ("class_scheduler", "the model's"),
    ("block_size", "not used"),
    ("lora_alpha", "the rank"),
    ("init_adapter", "not used"),
    ("text_encoder_lr", "that of the UNet"),
    ("snr_gamma", "off"),
    ("validation_scheduler", "the model's"),
    ("checkpoints_total_limit", "all"),
];

/// `table` with second names replaced by the settings' own.
pub fn own_names(mut table: toml::Table) -> toml::Table {
    for (second, own) in SECOND_NAMES {
        if let Some(value) = table.remove(*second) {
            table.insert((*own).to_string(), value);
        }
    }
    table
}
