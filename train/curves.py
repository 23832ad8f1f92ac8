"""What stands in RUN/metrics.jsonl, and what of it is drawn: panels of curves, their axes, their numbers in words.

train/plot.py draws them in a terminal and as a PNG, infer/chart.py on a page. Nothing here imports torch, so that a
look takes no longer than it must.
"""

import json
import math
from dataclasses import dataclass
from itertools import accumulate

from data.common.disk import naming
from data.common.flags import FP32, MOST
from data.common.words import many

HELD_OUT, TRAINED = "held_out/difference", "held_out/train_difference"
ERRORS = {HELD_OUT: "held_out/standard_error", TRAINED: "held_out/train_standard_error"}
FAINT, OTHER, MAIN = LOOKS = "faint", "other", "main"  # a mean's single values, what is compared, the curve itself


# ---- Reading


def read(path):
    """-> the lines of a metrics.jsonl, {name: value} each, by step; [] where there is no such file.

    Lines that are not whole (a run that trains is writing one) or are none of a training's are left out.
    """
    found = {}
    if not path.exists():
        return []
    with naming(path), open(path, encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                continue
            step = line.get("step") if isinstance(line, dict) else None
            if type(step) is int and 0 < step <= MOST:
                found[step] = line
    return [found[step] for step in sorted(found)]


def series(lines):
    """-> {name: (steps, values)} of the lines' finite numbers, by the names that flat() gives them."""
    found = {}
    for line in lines:
        for name, value in flat(line).items():
            steps, values = found.setdefault(name, ([], []))
            steps.append(line["step"])
            values.append(value)
    return found


def flat(line):
    """-> {name: number} of a line, less its step and what is no finite number.

    What was measured on held-out pictures is held_out/difference and so on, a timestep band's held_out/band_0_250.
    """
    held_out = line.get("held_out")
    held_out = held_out if isinstance(held_out, dict) else {}
    bands = held_out.get("bands")
    found = line | {f"held_out/{name}": value for name, value in held_out.items()}
    for band in bands if isinstance(bands, list) else []:
        if isinstance(band, dict):
            found[f"held_out/band_{band.get('from')}_{band.get('to')}"] = band.get("difference")
    return {name: value for name, value in found.items() if name != "step" and is_number(value)}


def is_number(value):
    return type(value) in (int, float) and -FP32[1] <= value <= FP32[1]  # not so of NaN


# ---- What is drawn


@dataclass(frozen=True)
class Curve:
    """Of one run in one panel. Lists of the same length."""

    run: int  # its position, for colour and letter
    name: str
    steps: list
    values: list
    looks: str = MAIN
    errors: list = ()  # standard errors

    def ranges(self):
        """[(low, high)]: how far each value reaches with its error."""
        errors = self.errors or [0.0] * len(self.values)
        return [(value - error, value + error) for value, error in zip(self.values, errors)]


@dataclass(frozen=True)
class Axis:
    low: float
    high: float
    base: int | None = None  # of its logarithm; None: linear
    least: float = 0.0  # between two ticks

    def place(self, value):
        """0 at the low end, 1 at the high end; what lies beyond is at the end."""
        if self.base:
            value = max(value, self.low)
            return min(1.0, math.log(value / self.low) / math.log(self.high / self.low))
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))

    def ticks(self, most):
        """-> [(value, its words)]: at most so many round values in its range, all of them written in one way."""
        if self.base:
            first, last = (math.log(end, self.base) for end in (self.low, self.high))
            first, last = math.ceil(first - 1e-9), math.floor(last + 1e-9)
            every = max(1, math.ceil((last - first + 1) / most))
            values = [float(self.base) ** n for n in range(first, last + 1, every)]
        else:
            raw = max((self.high - self.low) / most, self.least)
            size = 10.0 ** math.floor(math.log10(raw))
            size *= next(factor for factor in (1, 2, 5, 10) if factor * size >= raw * (1 - 1e-9))
            first, last = math.ceil(self.low / size - 1e-9), math.floor(self.high / size + 1e-9)
            values = [n * size for n in range(first, last + 1)]
        small = 1 if any(0 < abs(value) < 1e-4 for value in values) else 1e-4
        return [(value, words(value, small)) for value in values]


@dataclass(frozen=True)
class Panel:
    title: str
    curves: list
    axis: Axis  # of the values
    height: int  # pixels, of a picture that is 1,200 wide


def panels(runs, looks=LOOKS):
    """-> what there is to draw of loss, held-out difference, learning rate and loss scale, in this order.

    runs: [series]. looks: those of the curves that are drawn.
    """
    spans = sorted({_span(steps) for _, steps, _ in _with(runs, "loss")})
    means = f", mean of {' to '.join(map(str, dict.fromkeys((spans[0], spans[-1]))))} steps" if spans > [1] else ""
    rates = [Curve(n, "learning rate", *numbers) for n, *numbers in _with(runs, "lr")]
    scales = [Curve(n, "loss scale", *numbers) for n, *numbers in _with(runs, "loss_scale") if len(set(numbers[1])) > 1]
    out = []
    for title, height, curves, axis in (
        (f"loss{means}", 420, _losses(runs), _around),
        ("held-out loss minus the base's; below 0 is better", 330, _differences(runs), _from_0),
        ("learning rate", 170, rates, _of_rates),
        ("loss scale", 170, scales, _of_powers),
    ):
        if curves := [curve for curve in curves if curve.looks in looks]:
            out.append(Panel(title, curves, axis(curves), height))
    return out


def steps_axis(runs):
    steps = [end for run in runs for some, _ in run.values() for end in (some[0], some[-1])]
    return Axis(0, max(steps), least=1)


def _with(runs, name):
    return [(n, *run[name]) for n, run in enumerate(runs) if name in run]


def _losses(runs):
    for n, steps, values in _with(runs, "loss"):
        if _span(steps) > 1:
            yield Curve(n, "each step", steps, values, FAINT)
    for n, steps, values in _with(runs, "loss"):
        yield Curve(n, "mean" if _span(steps) > 1 else "loss", steps, running_mean(values, _span(steps)))


def _span(steps):
    """How many steps' loss a mean is of: each is of other pictures and another noise, and tells little alone."""
    return len(steps) // 50 * 2 + 1


def _differences(runs):
    for number, name, looks in ((TRAINED, "trained on", OTHER), (HELD_OUT, "held out", MAIN)):
        for n, steps, values in _with(runs, number):
            errors = dict(zip(*runs[n].get(ERRORS[number], ([], []))))
            yield Curve(n, name, steps, values, looks, errors and [errors.get(step, 0.0) for step in steps])


def _around(curves, more=()):
    """A linear axis with some room around the values, but none on the other side of 0."""
    ends = list(more)
    for curve in curves:  # a few single values far from the others would press all of them flat
        ranges, cut = sorted(curve.ranges()), len(curve.steps) // 200 if curve.looks == FAINT else 0
        ends += [end for some in ranges[cut : len(ranges) - cut] for end in some]
    low, high = min(ends), max(ends)
    if low == high == 0:
        return Axis(0.0, 1.0)
    room = (high - low) * 0.06 or abs(high) * 0.1
    return Axis(low - room if low < 0 else max(0.0, low - room), high + room if high > 0 else min(0.0, high + room))


def _from_0(curves):
    return _around(curves, [0.0])


def _of_rates(curves):
    """Logarithmic where the runs' peaks are far apart, and not for one that ends at 0."""
    peaks = [peak for curve in curves if (peak := max(curve.values)) > 0]
    if peaks and max(peaks) >= 8 * min(peaks):
        return Axis(min(peaks) / 50, max(peaks) * 1.2, 10)
    return _from_0(curves)


def _of_powers(curves):
    """Of 2. A scale that is none, such as 0, is at the lower end."""
    shown = [value for curve in curves for value in curve.values if value > 0] or [1.0]
    return Axis(min(shown) / 1.5, max(shown) * 1.5, 2)


def running_mean(values, span):
    """The mean of `span` values around each, an odd number; at the ends of those that are there.

    Summed in whole numbers of 2**-60, which are exact, so that one huge value leaves nothing behind.
    """
    sums, half = [0, *accumulate(round(value * 2.0**60) for value in values)], span // 2
    ends = ((max(0, n - half), min(len(values), n + half + 1)) for n in range(len(values)))
    return [(sums[end] - sums[start]) / ((end - start) << 60) for start, end in ends]


def thinned(steps, values, stretches):
    """-> [(step, value)]: of each of so many stretches the lowest and the highest, so that no peak is lost."""
    if len(steps) <= 2 * stretches:
        return list(zip(steps, values))
    bounds = [n * len(steps) // stretches for n in range(stretches + 1)]
    found = {0, len(steps) - 1}
    for start, end in zip(bounds, bounds[1:]):
        found |= {min(range(start, end), key=values.__getitem__), max(range(start, end), key=values.__getitem__)}
    return [(steps[n], values[n]) for n in sorted(found)]


def words(value, small=1e-4):
    """A number as people write it: 65,536, -0.0123; and 1e-5 where it is less than `small`, 1e9 where it is long."""
    if value and not small <= abs(value) < 1e7:
        power = math.floor(math.log10(abs(value) * (1 + 1e-9)))
        return f"{value / 10.0**power:.3g}e{power}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def last(run):
    """How a run stands, in words. run: its series."""
    facts = []
    if "loss" in run:
        steps, values = run["loss"]
        facts.append(f"loss {words(running_mean(values, _span(steps))[-1])}")
    for name, where in ((HELD_OUT, "held out"), (TRAINED, "trained")):
        if name in run:
            steps, values = run[name]
            error = dict(zip(*run.get(ERRORS[name], ([], [])))).get(steps[-1])
            facts.append(f"{where} {words(values[-1])}" + ("" if error is None else f" ± {words(error)}"))
            lowest = values.index(min(values))
            if name == HELD_OUT and lowest < len(values) - 1:
                facts.append(f"lowest {words(values[lowest])} at step {steps[lowest]:,}")
    return ", ".join([many(max(some[-1] for some, _ in run.values()), "step"), *facts])
