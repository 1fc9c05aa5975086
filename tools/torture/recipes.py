"""Which files are damaged, and the command that reads them, of those that lie in the repository; made.py has the others."""

from folders import copy_tree, link_tree

PROMPT = ["--prompt", "a cat", "--steps", "1", "--scheduler", "ddim", "--width", "16", "--height", "16", "--output", "out"]


class Recipe:
    """Files below `in/`, of which some are damaged, and a command in the case's folder that reads them and writes to `out`.

    `places` maps names below `in/` to files or folders; `damaged` are the beginnings of the names that may be hurt; `own` those
    that the command writes into, and what comes of them is looked at as the output is.
    """

    def __init__(self, name, weight, places, words, damaged=("",), own=(), may_take_long=False, many=None):
        self.name, self.weight, self.places, self.words = name, weight, places, [str(word) for word in words]
        self.damaged, self.own, self.may_take_long = damaged, own, may_take_long
        # Files that are read one by one: so many of them are hurt at once, and each is judged by itself.
        self.many = many

    def lay(self, folder):
        """Makes the input of a case."""
        for name, source in self.places.items():
            (copy_tree if name in self.own else link_tree)(source, folder / "in" / name)


def stored(root):
    """Those whose files lie in the repository."""
    fixtures, case = root / "tests/fixtures", root / "tests/fixtures/cases/sd15"
    model, images = case / "pipeline", fixtures / "images"
    sample, found = ["sample", "--model", model], []
    add = lambda *words, **more: found.append(Recipe(*words, **more))
    for name in ("hra-r4", "hra-r4-bias", "lora-r4-rs", "oft-b4", "boft-b4", "coft-b4", "dora-r2", "text-hra-r4"):
        at = {"a": case / name}
        add("adapter-inspect", 2, at, ["inspect", "in/a", "--json"])
        add("adapter-model", 1, at, ["inspect", "in/a", "--model", model, "--json"])
        add("adapter-sample", 1.5, at, [*sample, "--adapter", "in/a=0.7", *PROMPT])
    for name in ("hra-r4", "lora-r4", "oft-b4-exact"):
        add("merge", 2, {"a": case / name, "b": case / name}, ["merge", "in/a=0.7", "in/b", "--output", "out"])
        for to, output in (("peft-lora", "out"), ("kohya-lora", "out.safetensors"), ("merged", "out")):
            add("export", 0.7, {"a": case / name}, ["export", "--model", model, "--adapter", "in/a", "--to", to, "--output", output])
    for name in ("adapter", "dora", "kohya", "pipeline"):
        at = {"x.safetensors": fixtures / f"lora/{name}.safetensors"}
        add("lora-inspect", 2.5, at, ["inspect", "in/x.safetensors", "--json"])
        add("lora-sample", 1.5, at, [*sample, "--adapter", "in/x.safetensors", *PROMPT])
    for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "model_index"):
        add("model-sample", 4, {"m": model}, ["sample", "--model", "in/m", *PROMPT], damaged=(f"m/{part}",))
    add("model-inspect", 5, {"m": model}, ["inspect", "in/m", "--json"])
    add("vae", 4, {"vae": model / "vae"}, [*sample, "--vae", "in/vae", *PROMPT])
    for name in ("demo.toml", "sd15-subject.toml", "methods/oft.toml", "methods/hra.toml"):
        if (root / "configs" / name).is_file():
            add("train-config", 5, {"c.toml": root / "configs" / name}, ["train", "--print-config", "in/c.toml"])
    pictures = sorted(path.name for path in images.iterdir() if path.suffix in (".png", ".jpg", ".webp", ".tif", ".bmp"))
    # One name may have several endings: what comes of each has a name of its own.
    folder = {f"p/{i:02}-{name}": images / name for i, name in enumerate(pictures)}
    add("picture", 25, folder, ["prepare", "canny", "in/p", "--output", "out"], many=8)
    for name in pictures:
        add("start-picture", 0.3, {name: images / name}, [*sample, "--image", f"in/{name}", "--strength", "1", *PROMPT])
    add("mask", 2, {"i.png": images / "rgba.png", "m.png": images / "one_bit.png"},
        [*sample, "--image", "in/i.png", "--mask", "in/m.png", *PROMPT], damaged=("m.png",))
    control = [*sample, "--control", images / "rgba.png", "--condition", "other", *PROMPT]
    add("controlnet", 5, {"c": case / "controlnet"}, [*control, "--controlnet", "in/c"])
    return found
