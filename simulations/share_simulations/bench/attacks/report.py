"""What an attack run says: scalars, a table and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from share_simulations.bench.attacks.options import AttackOptions

if TYPE_CHECKING:
    from rich.table import Table

UNTARGETED = ("sign-flip", "scale", "random", "alie", "ipm", "stealth", "label-flip")
"""Attacks that want the shared tasks to be worse, whatever the answer."""

COST = 0.02
"""An attack that costs more accuracy than this at one fifth hostile wins."""

FOOLED = 0.1
"""A backdoor that adds more than this to the rows that are taken for its class wins."""


@dataclass(frozen=True)
class Setting:
    """One attack at one share of hostile organisations."""

    attack: str
    fraction: float
    """Share of hostile organisations."""
    defence: str
    """``on`` or ``off``."""
    accuracy: float
    """Mean over the shared tasks and the heads of some honest clients."""
    by_task: Mapping[str, float]
    """The same of every shared task."""
    fooled: float | None
    """Share of rows with the trigger that are taken for the backdoor's class, where it was measured."""
    stored_accuracy: float | None
    """Mean over the tasks that were stored before, where it was measured."""
    worst_stored_error: float
    """Largest bound of the relative error of a task that was stored before."""
    hostile_stopped: float
    """Share of hostile updates that do not count in the end."""
    honest_refused: float
    """Share of honest updates that do not count in the end."""
    seconds: float
    """What the merge and the measurement took."""


def summary(options: AttackOptions, settings: Sequence[Setting]) -> dict[str, Any]:
    """Return the figures of a run. Losses are against nobody hostile and no defence, with all clients honest."""
    plain = _find(settings, "none", 0.0, "off")
    guarded = [one for one in settings if one.defence == "on"]
    at_20 = {attack: plain.accuracy - _find(settings, attack, 0.2, "on").accuracy for attack in UNTARGETED}
    open_at_20 = {attack: plain.accuracy - _find(settings, attack, 0.2, "off").accuracy for attack in UNTARGETED}
    backdoor = _find(settings, "backdoor", 0.2, "on")
    forgetting = _find(settings, "forgetting", 0.2, "on")
    # What was stored before, and the shared tasks, which lie in the same space.
    forgotten = (plain.stored_accuracy or 0.0) - (forgetting.stored_accuracy or 0.0)
    forgotten = max(forgotten, plain.accuracy - forgetting.accuracy)
    wins = [attack for attack, lost in at_20.items() if lost > COST]
    wins += ["backdoor"] if (backdoor.fooled or 0.0) - (plain.fooled or 0.0) > FOOLED else []
    wins += ["forgetting"] if forgotten > COST else []
    return {
        "worst_untargeted_loss_at_20": max(at_20.values()),
        "honest_refused": sum(one.honest_refused for one in guarded) / len(guarded),
        "backdoor_success": backdoor.fooled,
        "backdoor_success_without_defence": _find(settings, "backdoor", 0.2, "off").fooled,
        "taken_for_the_backdoor_without_attack": plain.fooled,
        "worst_honest_refused": max(one.honest_refused for one in guarded),
        "worst_untargeted_loss_at_20_without_defence": max(open_at_20.values()),
        "cost_of_the_defence_without_attack": plain.accuracy - _find(settings, "none", 0.0, "on").accuracy,
        "forgetting_loss_at_20": forgotten,
        "wins_at_20": wins,
        "clients": options.clients,
        "rows": options.rows,
        "shared": list(options.shared),
        "stored": list(options.stored),
        "table": [{**asdict(one), "loss": plain.accuracy - one.accuracy} for one in settings],
    }


def table(report: Mapping[str, Any]) -> Table:
    """Return one row per attack and share: what is lost without and with the defence, and who was stopped."""
    from rich.table import Table

    made = Table("attack", "hostile", "lost", "defended", "stopped", "honest refused", "stored error", "fooled")
    rows = {(row["attack"], row["fraction"], row["defence"]): row for row in report["table"]}
    for (attack, fraction, defence), row in rows.items():
        if defence == "off":
            continue
        bare = rows[attack, fraction, "off"]
        fooled = "" if row["fooled"] is None else f"{bare['fooled']:.3f} / {row['fooled']:.3f}"
        figures = [bare["loss"], row["loss"], row["hostile_stopped"], row["honest_refused"]]
        errors = f"{bare['worst_stored_error']:.2f} / {row['worst_stored_error']:.2f}"
        made.add_row(attack, f"{fraction:.0%}", *(f"{figure:.3f}" for figure in figures), errors, fooled)
    made.caption = f"at 20 % these still win: {', '.join(report['wins_at_20']) or 'none'}"
    return made


def _find(settings: Sequence[Setting], attack: str, fraction: float, defence: str) -> Setting:
    return next(one for one in settings if (one.attack, one.fraction, one.defence) == (attack, fraction, defence))


def write_plot(report: Mapping[str, Any], folder: Path) -> Path:
    """Draw accuracy against the share of hostile organisations, without and with the defence; return the path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    rows = report["table"]
    start = {row["defence"]: row["accuracy"] for row in rows if row["attack"] == "none"}
    for place, (defence, title) in zip(axes, (("off", "without defence"), ("on", "with the defaults")), strict=True):
        for attack in dict.fromkeys(row["attack"] for row in rows if row["attack"] != "none"):
            own = [row for row in rows if (row["attack"], row["defence"]) == (attack, defence)]
            shares = [0.0, *(100 * row["fraction"] for row in own)]
            place.plot(shares, [100 * start[defence], *(100 * row["accuracy"] for row in own)], marker="o", ms=3)
        place.set_title(title, fontsize=10)
        place.set_xlabel("hostile organisations, %")
        place.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy on the shared tasks, %")
    names = list(dict.fromkeys(row["attack"] for row in rows if row["attack"] != "none"))
    axes[1].legend(names, fontsize=7, loc="lower left")
    FigureCanvasAgg(figure)
    path = folder / "attacks.png"
    figure.savefig(path, dpi=130)
    return path
