//! What can be checked of the settings without opening a file.

use crate::adapter::Method;
use crate::adapter::peft::Bias;
use crate::adapter::target::TargetRule;
use crate::data::pairs::ConditionKind;
use crate::error::{Error, Result};
use crate::train::config::{DataSection, MethodName, TrainConfig};
use crate::weights::bounds::is_factor;
use std::path::Path;

/// What is wrong with the settings, one sentence each, and what helps.
#[derive(Default)]
struct FoundProblems {
    problems: Vec<String>,
    hints: Vec<String>,
}

impl FoundProblems {
    fn require(&mut self, ok: bool, problem: &str) {
        if !ok {
            self.problems.push(problem.to_string());
        }
    }

    fn into_result(self) -> Result<()> {
        let Self { problems, hints } = self;
        if problems.is_empty() { Ok(()) } else { Err(Error::config(problems.join("\n")).with_hints(hints)) }
    }

    /// What is wrong by `result`, if it is an error.
    fn take<T>(&mut self, result: Result<T>) -> Option<T> {
        result
            .map_err(|error| {
                self.problems.push(error.kind.to_string());
                self.hints.extend_from_slice(error.hints());
            })
            .ok()
    }
}

fn given(path: &Path) -> bool {
    !path.as_os_str().is_empty()
}

/// From 0 up to what f32 holds; larger factors are none for libtorch.
fn natural(x: f64) -> bool {
    (0.0..=f64::from(f32::MAX)).contains(&x)
}

fn positive(x: f64) -> bool {
    natural(x) && x > 0.0
}

impl TrainConfig {
    /// Checks everything that can be checked without opening a file; all problems are listed.
    pub fn validate(&self) -> Result<()> {
        let mut problems = FoundProblems::default();
        problems.require(
            given(&self.model.pretrained_model_name_or_path),
            "pretrained_model_name_or_path: a model folder is needed",
        );
        if self.is_control() {
            self.check_control(&mut problems);
        } else {
            self.check_subject(&mut problems);
        }
        self.check_values(&mut problems);
        problems.into_result()
    }

    /// Checks what is set; what is not set yet, such as the model, may be missing.
    pub fn validate_values(&self) -> Result<()> {
        let mut problems = FoundProblems::default();
        self.check_values(&mut problems);
        problems.into_result()
    }

    fn check_values(&self, problems: &mut FoundProblems) {
        self.check_counts(problems);
        self.check_numbers(problems);
        self.check_adapter(problems);
    }

    fn check_control(&self, problems: &mut FoundProblems) {
        problems.require(
            !given(&self.data.instance_data_dir) && self.data.instance_prompt.is_empty(),
            "instance_data_dir and instance_prompt: train_data_dir has pictures and captions of its own",
        );
        problems.require(
            !self.prior.with_prior_preservation,
            "with_prior_preservation: class pictures have no conditions; leave it out with train_data_dir",
        );
        let (images, prompts) = (self.previews.validation_image.len(), self.previews.validation_prompt.len());
        problems.require(
            images == prompts || images == 1 && prompts > 0,
            "validation_image: expected one for each validation_prompt, or one for all",
        );
    }

    fn check_subject(&self, problems: &mut FoundProblems) {
        problems.require(
            given(&self.data.instance_data_dir),
            "instance_data_dir: a folder with the subject's pictures is needed (or train_data_dir, to train control)",
        );
        problems.require(
            !self.data.instance_prompt.trim().is_empty(),
            "instance_prompt: a prompt is needed, such as \"a photo of sks dog\"",
        );
        let data = DataSection::default();
        let pairs = |data: &DataSection| {
            let columns = [&data.image_column, &data.caption_column, &data.conditioning_image_column]
                .map(String::clone);
            (data.canny_low, data.canny_high, columns)
        };
        problems.require(
            pairs(&self.data) == pairs(&data),
            "canny_low, canny_high, image_column, caption_column and conditioning_image_column: only with train_data_dir",
        );
        let idle = self.previews.validation_image.is_empty()
            && self.optimizer.control_lr.is_none()
            && self.data.proportion_empty_prompts == 0.0
            && self.data.palette.is_none()
            && !self.data.make_conditions
            && !self.data.strict_paths
            && self.data.condition == ConditionKind::Other;
        problems.require(
            idle && self.adapter.method != MethodName::NONE,
            "condition, make_conditions, palette, strict_paths, proportion_empty_prompts, control_lr, validation_image and method \
             none: only with train_data_dir",
        );
    }

    fn check_counts(&self, problems: &mut FoundProblems) {
        let mut require = |ok, problem| problems.require(ok, problem);
        require(given(&self.output_dir), "output_dir: a folder is needed");
        if self.prior.with_prior_preservation {
            require(
                !self.prior.class_prompt.trim().is_empty(),
                "class_prompt: needed for prior preservation",
            );
            require(self.prior.num_class_images >= 1, "num_class_images: expected 1 or more");
            require(self.prior.class_steps >= 1, "class_steps: expected 1 or more");
        }
        require(
            self.data.resolution.is_none_or(|r| (8..=4096).contains(&r)),
            "resolution: expected 8 to 4096 pixels",
        );
        // Far above any use, and far below what would overflow a count or fill a memory.
        require(self.prior.num_class_images <= 1_000_000, "num_class_images: expected at most 1000000");
        require(
            self.previews.num_validation_images <= 10_000,
            "num_validation_images: expected at most 10000",
        );
        require(self.schedule.train_batch_size <= 4096, "train_batch_size: expected at most 4096");
        require(self.prior.sample_batch_size <= 4096, "sample_batch_size: expected at most 4096");
        require(
            self.schedule.max_train_steps <= 1_000_000_000,
            "max_train_steps: expected at most 1000000000",
        );
        require(self.schedule.max_train_steps >= 1, "max_train_steps: expected 1 or more");
        require(self.schedule.train_batch_size >= 1, "train_batch_size: expected 1 or more");
        require(self.prior.sample_batch_size >= 1, "sample_batch_size: expected 1 or more");
        require(
            self.schedule.gradient_accumulation_steps >= 1,
            "gradient_accumulation_steps: expected 1 or more",
        );
        require(self.schedule.lr_warmup_steps >= 0, "lr_warmup_steps: expected 0 or more");
        require(self.previews.validation_steps >= 1, "validation_steps: expected 1 or more");
        require(self.checkpoints.checkpointing_steps >= 1, "checkpointing_steps: expected 1 or more");
        require(
            self.checkpoints.checkpoints_total_limit != Some(0),
            "checkpoints_total_limit: expected 1 or more",
        );
        require(self.checkpoints.log_every >= 1, "log_every: expected 1 or more");
    }

    fn check_numbers(&self, problems: &mut FoundProblems) {
        let mut require = |ok, problem| problems.require(ok, problem);
        require(
            (0.0..=1.0).contains(&self.data.proportion_empty_prompts),
            "proportion_empty_prompts: expected a share, 0 to 1",
        );
        require(
            self.data.pair_settings().thresholds.are_possible(),
            "canny_low and canny_high: expected two numbers from 0 up, the first not above the second, which is 2040 at most",
        );
        require(
            self.optimizer.text_encoder_lr.iter().all(|rates| {
                let named = rates.named();
                (1..=2).contains(&named.len()) && named.iter().copied().all(positive)
            }),
            "text_encoder_lr: expected one number above 0, or two with a comma between them",
        );
        require(self.optimizer.control_lr.is_none_or(positive), "control_lr: expected a number above 0");
        require(positive(self.optimizer.learning_rate), "learning_rate: expected a number above 0");
        require(natural(self.optimizer.adam_weight_decay), "adam_weight_decay: expected 0 or more");
        require(positive(self.optimizer.adam_epsilon), "adam_epsilon: expected a number above 0");
        require(positive(self.optimizer.max_grad_norm), "max_grad_norm: expected a number above 0");
        require(natural(self.prior.prior_loss_weight), "prior_loss_weight: expected 0 or more");
        require(self.optimizer.snr_gamma.is_none_or(positive), "snr_gamma: expected a number above 0");
        require(is_factor(self.prior.class_guidance), "class_guidance: expected a number up to 1e6");
        require(
            is_factor(self.previews.validation_guidance),
            "validation_guidance: expected a number up to 1e6",
        );
        require((0.0..1.0).contains(&self.optimizer.adam_beta1), "adam_beta1: expected 0 up to 1");
        require((0.0..1.0).contains(&self.optimizer.adam_beta2), "adam_beta2: expected 0 up to 1");
        require((0.0..1.0).contains(&self.optimizer.ema_decay), "ema_decay: expected 0 up to 1");
        require(
            natural(self.schedule.lr_num_cycles) && natural(self.schedule.lr_power),
            "lr_num_cycles and lr_power: expected 0 or more",
        );
    }

    fn check_adapter(&self, problems: &mut FoundProblems) {
        let mut require = |ok, problem| problems.require(ok, problem);
        require(!self.adapter.target_modules.is_empty(), "target_modules: expected at least one name");
        require(
            !self.adapter.text_target_modules.is_empty(),
            "text_target_modules: expected at least one name",
        );
        let none = self.adapter.method == MethodName::NONE;
        require(!none || self.adapter.init_adapter.is_none(), "init_adapter: method none has no adapter");
        require(
            !none || !self.adapter.train_text_encoder,
            "train_text_encoder: method none trains the control encoder alone",
        );
        require(
            !none || self.adapter.bias == Bias::None,
            "bias: method none trains the control encoder alone",
        );
        if let Some(Some(method)) = problems.take(self.adapter.method()) {
            self.check_method(&method, problems);
        }
        for words in [&self.adapter.target_modules, &self.adapter.text_target_modules] {
            problems.take(TargetRule::from_words(words));
        }
    }

    fn check_method(&self, method: &Method, problems: &mut FoundProblems) {
        problems.take(method.validate());
        let name = self.adapter.method;
        let whole = method.trains_whole_network();
        problems.require(
            !whole || !self.adapter.train_text_encoder,
            &format!("train_text_encoder: method {name} trains the UNet alone"),
        );
        problems.require(
            !whole || self.adapter.init_adapter.is_none(),
            &format!("init_adapter: method {name} starts from a model, not an adapter"),
        );
        problems.require(
            method.keeps_bias() || self.adapter.bias == Bias::None,
            &format!("bias: method {name} has no place for trained biases"),
        );
    }
}
