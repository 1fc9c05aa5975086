"""The results as Markdown."""


def gigabytes(value):
    return f"{value / 1e9:.2f}"


def hundredths(value):
    return f"{value:.2f}"


# Key, title and form of each column.
FIGURES = [
    ("measure", "measure", str), ("side", "side", str), ("milliseconds", "ms", lambda value: f"{value:.1f}"),
    ("rounds", "ms of each run", lambda values: ", ".join(f"{value:.1f}" for value in values)),
    ("allocated", "peak allocated GB", gigabytes), ("reserved", "peak reserved GB", gigabytes),
    ("waits", "host waits a step", hundredths), ("copies", "copies to the host a step", hundredths),
    ("idle", "GPU idle", lambda value: f"{value:.0f} %"),
]
PARTS = ["part", "passed", "made", "skipped", "expected", "seconds", "message"]
CHECKS = ["part", "check", "device", "found", "expected", "error", "limit", "passed", "seconds", "message"]


def page(data):
    about = data["about"]
    device = about.get("device") or "unknown device"
    skipped = [check for check in data["checks"] if "skipped" in check]
    words = [f"{key} {value}" for key, value in about.items() if key not in ("device", "speed") and value is not None]
    lines = [f"# {device}", "", ", ".join(words), ""]
    lines += rows(PARTS, [[part.get(key) if key != "passed" else mark(part["ok"]) for key in PARTS] for part in data["parts"]])
    lines += [f"- skipped: {check['part']}: {check['name']} ({check['skipped']})" for check in skipped] + [""] * bool(skipped)
    if data["figures"]:
        lines += [f"## Speed: {device}", "", about.get("speed", ""), "", *figures(data)]
    return "\n".join([*lines, "## Checks", "", *rows(CHECKS, map(check_row, data["checks"]))])


def check_row(check):
    passed = "skipped" if "skipped" in check else mark(check["ok"])
    return [check["part"], check["name"], check["device"], number(check["found"]), number(check["expected"]),
            number(check["error"], 2), number(check["limit"], 2), passed, check["seconds"],
            check.get("message", check.get("skipped"))]


def figures(data):
    return rows([title for _, title, _ in FIGURES], [
        [shown(figure.get(key), show) for key, _, show in FIGURES] for figure in data["figures"]])


def difference(check):
    """In a few words, why a check failed."""
    words = [("found", 5), ("expected", 5), ("error", 2), ("limit", 2)]
    return ", ".join(f"{word} {number(check[word], digits)}" for word, digits in words if check[word] is not None)


def rows(titles, cells):
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    return lines + ["| " + " | ".join(cell(value) for value in row) + " |" for row in cells] + [""]


def cell(value):
    return "" if value is None else " ".join(str(value).replace("|", "\\|").split())[:300]


def mark(ok):
    return "yes" if ok else "**no**"


def shown(value, show):
    return "-" if value is None else show(value)


def number(value, digits=5):
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    if isinstance(value, list):
        few = ", ".join(number(one, digits) for one in value[:3])
        return few + (f", .. ({len(value)})" if len(value) > 3 else "")
    return "" if value is None else str(value)
