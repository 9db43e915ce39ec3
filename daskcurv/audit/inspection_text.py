"""What an inspection found, for people, and the launch that fits it.

What cannot be known from files is a word in capitals in the command, with a sentence on how to find
it out.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from itertools import pairwise

from daskcurv.audit.inspection import DataSet, Inspection, WeightFile, WeightGroup
from daskcurv.logs import counted
from daskcurv.places import listed
from daskcurv.runs.options import LaunchOptions

_DESCRIBED = 5
"""Groups of files that are described; of others only the number."""


def report(found: Inspection) -> str:
    """Return the whole report; it ends with the command."""
    lines: list[str] = []
    for group in found.groups[:_DESCRIBED]:
        lines += [*_group(group), ""]
    if more := found.groups[_DESCRIBED:]:
        firsts = listed([str(group.names.paths[0]) for group in more])
        lines += [f"{counted(len(more), 'other file or group')}, not read: {firsts}", ""]
    for dataset in found.datasets:
        lines += [*_dataset(dataset), ""]
    lines += [f"note: {remark}" for remark in found.remarks]
    command, sentences = launch_command(found)
    lines += ["the launch that fits:", "", f"  {command}", ""]
    return "\n".join([*lines, *(f"- {sentence}" for sentence in sentences)]).rstrip()


def _line(label: str, text: str) -> str:
    return f"  {label:<11} {text}"


def _group(group: WeightGroup) -> Iterator[str]:
    names = group.names
    yield f"weights: {counted(len(names.paths), 'file')}"
    yield _line("names", listed([str(path) for path in names.paths]))
    for one in names.varying:
        yield _line("varies", one)
    if names.pattern:
        yield _line("pattern", f"{names.pattern} ({names.counted}: {names.how})")
    else:
        yield _line("pattern", f"not known: {names.how}")
    if names.surplus:
        yield _line("", f"it also fits {counted(names.surplus, 'file')} not named here")
    if names.epochs:
        yield _line(f"{names.counted}s", f"{len(names.epochs)}: {_range(names.epochs)}")
    for kind, values in names.others.items():
        yield _line(f"{kind}s", ", ".join(map(str, values)))
    if names.directory is not None:
        yield _line("", "the names are those of the documented run")
    yield _line("read", f"{len(group.files)} of {len(names.paths)} files")
    for file in group.files:
        yield from _file(file)
    yield from _differences(group)


def _range(values: tuple[int, ...]) -> str:
    steps = {after - before for before, after in pairwise(values)}
    if len(values) < 4:
        return ", ".join(map(str, values))
    spacing = f"every {steps.pop()}" if len(steps) == 1 else "unevenly spaced"
    return f"{values[0]} … {values[-1]}, {spacing}"


def _file(file: WeightFile) -> Iterator[str]:
    yield f"  {file.path.name}"
    if file.problem:
        yield f"    cannot be read: {file.problem}"
        return
    yield "    loads safely: nothing but tensors and plain data"
    if file.no_weights:
        yield f"    no weights: {file.no_weights}"
    else:
        yield f"    weights: {_where(file)}"
        yield (
            f"    {counted(len(file.shapes), 'tensor')}, {counted(file.parameters, 'parameter')}, "
            f"{', '.join(file.dtypes)}"
        )
        if file.spec:
            spec = file.spec
            yield (
                f"    the documented ResNet-18: {spec.num_classes} outputs, width {spec.width}, "
                f"{'batch normalisation' if spec.norm == 'batch' else 'no normalisation'}"
            )
        elif file.head:
            yield (
                f"    outputs: {file.outputs}, as the last matrix suggests ({file.head}, "
                f"{' × '.join(map(str, file.shapes[file.head]))})"
            )
        else:
            why = "no weight is a matrix" if file.in_order else "the file keeps no order of layers"
            yield f"    outputs: not known, as {why}"
        if file.not_finite:
            yield f"    NaN or infinite values in {listed(list(file.not_finite))}"
    if file.beside:
        there = [f"{name} {value}".rstrip() for name, value in file.beside.items()]
        yield f"    beside the weights: {listed(there)}"


def _where(file: WeightFile) -> str:
    shared = f"; all names begin with {file.shared!r}" if file.shared else ""
    return f"{file.payload}{shared}"


def _differences(group: WeightGroup) -> Iterator[str]:
    found = group.with_weights
    if other := next((file for file in found if file.shapes != found[0].shapes), None):
        outputs = {file.path.name: file.outputs for file in found}
        if len(set(outputs.values())) > 1:
            values = ", ".join(f"{number} in {name}" for name, number in outputs.items())
            yield _line("differ", f"outputs: {values}")
        first = found[0]
        names = sorted(
            name
            for name in {*first.shapes, *other.shapes}
            if first.shapes.get(name) != other.shapes.get(name)
        )
        yield _line(
            "differ",
            f"names or shapes in {first.path.name} and {other.path.name}: {listed(names)}; "
            + ("outputs were added" if group.grows else "a launch needs files of one network"),
        )
    if len({file.payload for file in found}) > 1:
        places = ", ".join(f"{file.path.name}: {file.payload}" for file in found)
        yield _line("differ", f"where the weights are: {places}")
    stated = [file for file in found if "epoch" in file.stated]
    if stated and group.names.epochs:
        values = ", ".join(f"{file.stated['epoch']} in {file.path.name}" for file in stated)
        yield _line("stated", f"the files themselves state their epoch: {values}")


def _dataset(data: DataSet) -> Iterator[str]:
    yield f"data: {data.path}"
    yield _line("format", data.form.description)
    if data.problem:
        yield f"  cannot be read: {data.problem}"
        return
    number, channels, *size = data.shape
    pixels = "of different sizes" if data.sizes_differ else f"{' × '.join(map(str, size))} pixels"
    yield _line("images", f"{number:,}, {pixels}, {counted(channels, 'channel')}, {data.dtype}")
    counts = data.counts.values()
    each = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} … {max(counts)}"
    yield _line("classes", f"{len(counts)}, with {each} images each")
    if max(data.counts) + 1 != len(counts):
        yield _line("labels", f"{min(data.counts)} … {max(data.counts)}, not all of them occur")
    names = listed(list(data.class_names)) or "not known"
    yield _line("class names", names)
    if data.form.mean and data.form.std:
        mean, std = _joined(data.form.mean), _joined(data.form.std)
        yield _line("mean, std", f"the documented run's, unless given: {mean} and {std}")
    else:
        yield _line("mean, std", "not known; they have to be given")


def _joined(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:g}" for value in values)


def launch_command(found: Inspection) -> tuple[str, list[str]]:
    """Return the command to launch, and a sentence for each thing that is not known.

    Words in capitals in the command are to be replaced.
    """
    group = _chosen_group(found)
    data = _chosen_data(found, group)
    words: list[str] = []
    sentences: list[str] = []
    for some, added in (_weight_words(group), _data_words(data, group, found.datasets)):
        words += some
        sentences += added
    if len(found.groups) > 1 and group is not None:
        sentences.append(
            f"The command takes the files like {group.names.paths[0]}; there are "
            f"{counted(len(found.groups) - 1, 'other group')} of weight files, any of which can be "
            "named instead."
        )
    if len(found.datasets) > 1 and data is not None:
        sentences.append(
            f"Of the {len(found.datasets)} data sets, {data.path} alone fits the weights."
        )
    return shlex.join(["daskcurv", "launch", *words]), sentences


def _chosen_group(found: Inspection) -> WeightGroup | None:
    """Return the first group whose weights were found, or else the first."""
    usable = (group for group in found.groups if group.with_weights)
    return next(usable, next(iter(found.groups), None))


def _chosen_data(found: Inspection, group: WeightGroup | None) -> DataSet | None:
    """Return the only data set, or the only one that fits the weights."""
    if len(found.datasets) == 1:
        return found.datasets[0]
    fitting = [one for one in found.datasets if not one.problem and not [*_agreement(one, group)]]
    return fitting[0] if len(fitting) == 1 else None


def _weight_words(group: WeightGroup | None) -> tuple[list[str], list[str]]:
    if group is None:
        return ["--checkpoints", "CHECKPOINTS", "--model", "MODEL"], [
            "CHECKPOINTS: where the weights are; inspect their directory to find the pattern.",
            _MODEL,
        ]
    names = group.names
    words: list[str] = []
    sentences: list[str] = []
    documented = names.directory is not None and group.has_documented_network
    if documented:
        words += ["--model_dir", str(names.directory)]
    elif names.pattern:
        words += ["--checkpoints", names.pattern]
    elif names.unnumbered and (key := group.count_stated):
        words += ["--checkpoints", names.unnumbered]
        stated = ", ".join(f"{file.stated[key]} in {file.path.name}" for file in group.files)
        sentences.append(
            f"The names do not say the epoch ({names.how}); without {{epoch}} in the pattern, a "
            f"launch takes what each file states under {key!r}: {stated}."
        )
    else:
        words += ["--checkpoints", "CHECKPOINTS"]
        sentences.append(
            f"CHECKPOINTS: {names.how}; give the names with {{epoch}} in the place of the epoch, "
            "and * for whatever else varies. Where a name has no epoch, make a link to the file "
            "whose name has one, such as net-200.pt."
        )
    for kind, option in (("experiment", "experiment_index"), ("task", "task")):
        values = names.others.get(kind, ())
        if len(values) > 1:
            words += [f"--{option}", option.upper()]
            sentences.append(
                f"{option.upper()}: one of {', '.join(map(str, values))}; a launch is for one "
                f"{kind}."
            )
        elif values and (kind == "task" or values[0] != LaunchOptions.experiment_index):
            words += [f"--{option}", str(values[0])]
    if not documented:
        sentences += _first_epoch(group)
    usual = range(LaunchOptions.start_epoch, LaunchOptions.end_epoch + 1, LaunchOptions.step)
    if documented and set(usual) != set(names.epochs):
        words += ["--epochs", "all"]
    if any("--weights_key" in file.no_weights for file in group.files):
        words += ["--weights_key", "WEIGHTS_KEY"]
        sentences.append("WEIGHTS_KEY: one of those that are named above.")
    if not group.has_documented_network:
        words += ["--model", "MODEL"]
        sentences.append(_MODEL)
    if group.grows:
        words += ["--head", "active"]
        sentences.append(
            "Outputs were added during training: give the network all of them, and say when "
            "classes were added. If classes were numbered as they were added, add --outputs "
            "class_order and --class_order."
        )
    if not documented:
        sentences.append(
            "That all classes were in training from the start, and no samples were held out, is "
            "assumed: if not, the training code says when classes were added (--class_schedule, "
            "--task_sizes) and what was held out (--validation_per_class)."
        )
    return words, sentences


def _first_epoch(group: WeightGroup) -> Iterator[str]:
    """Yield what the number 0 may mean."""
    stated = [file.stated["epoch"] for file in group.files if "epoch" in file.stated]
    epochs = group.names.epochs or (stated if group.count_stated == "epoch" else ())
    if epochs and min(epochs) == 0 and group.names.counted == "epoch":
        yield (
            "Epochs begin at 0: if those weights are of the end of the first epoch, not of the "
            "time before it, add --epoch_means last. Files do not say which; the training code "
            "does."
        )


_MODEL = (
    "MODEL: the network, as torchvision:NAME or path/net.py:factory; files of weights do not say "
    "it, the training code does. If the factory takes arguments, such as the number of outputs, "
    "add --model_args."
)


def _data_words(
    data: DataSet | None, group: WeightGroup | None, there: Sequence[DataSet]
) -> tuple[list[str], list[str]]:
    sentences: list[str] = []
    if data is None and there:
        words = ["--data_path", "DATA_PATH"]
        sentences.append(
            f"DATA_PATH: one of {listed([str(one.path) for one in there])}; which of them the "
            "network was trained on, the training code says."
        )
    elif data is None:
        words = ["--data_path", "DATA_PATH"]
        sentences.append(
            "DATA_PATH: the training set, in the order of the training run; inspect it to see "
            "whether its format is known."
        )
    else:
        words = ["--data_path", str(data.path)]
        sentences += _agreement(data, group)
    documented = group and group.names.directory is not None and group.has_documented_network
    known = data.form.mean is not None if data else documented
    if not known:
        words += ["--mean", "MEAN", "--std", "STD"]
        sentences.append(
            "MEAN and STD: the normalisation of the training run, of pixels scaled to 0 ... 1, "
            "comma-separated for several channels; the training code has them where it makes its "
            "transforms (Normalize), and 0 and 1 are right if there is none."
        )
    elif not documented:
        sentences.append(
            "Mean and std are the documented run's; if this training normalised otherwise, add "
            "--mean and --std."
        )
    if data and data.sizes_differ:
        words += ["--image_size", "IMAGE_SIZE"]
        sentences.append(
            "IMAGE_SIZE: the side of the squares that the network was given; the training code "
            "has it where it makes its transforms (Resize, CenterCrop)."
        )
    return words, sentences


def _agreement(data: DataSet, group: WeightGroup | None) -> Iterator[str]:
    """Yield what does not go together in weights and data."""
    found = group.with_weights if group else []
    if not found or data.problem:
        return
    outputs, labels = found[-1].outputs, max(data.counts) + 1
    if outputs is not None and outputs != labels:
        yield (
            f"The weights suggest {outputs} outputs, and the data have labels up to {labels - 1}: "
            "check that the network was trained on these data."
        )
    first = next((shape for shape in found[-1].shapes.values() if len(shape) == 4), None)
    if first and found[-1].in_order and first[1] != data.shape[1]:
        yield (
            f"The first convolution suggests {counted(first[1], 'channel')}, and the images have "
            f"{data.shape[1]}: check that the network was trained on these data."
        )
