"""What one more adapter costs the others, with T tasks stored, timed on a few sites and scaled to all of them.

A peer **does the same job** if it keeps every task apart in a shared subspace that is no larger than ours and loses at
most :data:`SAME_JOB` times our error. Merges that leave one adapter for all tasks (PEFT's ``add_weighted_adapter``,
FlexLoRA) do another job and are compared by ``bench compress`` only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from share_core.types import Adapter, Core, SiteBasis
from share_simulations.baselines.lorashare_peer import lorashare
from share_simulations.baselines.oracle import oracle
from share_simulations.baselines.paper import PaperSite, PaperState, paper_absorb, paper_once
from share_simulations.baselines.types import Compressed, errors, optional_package
from share_simulations.baselines.vlora import vlora_once, vlora_space
from share_simulations.bench.generated import Generator, Shape
from share_simulations.bench.machine import best_seconds, seconds

SAME_JOB = 2.0
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Peer:
    """One way to take one more adapter in."""

    name: str
    seconds: float
    """Wall time for all sites."""
    error: float
    """Mean relative error over all tasks."""
    numbers: int
    """Floats kept, on the sites it was timed on."""
    note: str
    restack: bool = False
    """Whether this is the published method's own merge."""
    same_job: bool = True


def require_peers() -> None:
    """Ask for the packages before the long work, not after it.

    Raises:
        ConfigError: naming the package to install.
    """
    optional_package("vlora", "vlora-dev==1.0.0")
    optional_package("lorashare", "lorashare==0.1.3")


def time_peers(
    shape: Shape, tasks: int, sites: int, ours: tuple[float, int], progress: Callable[[str], None]
) -> list[Peer]:
    """Return every peer's cost of one merge with ``tasks`` stored.

    Args:
        shape: of the adapters; the result is scaled to its number of sites.
        tasks: stored before the merge.
        sites: how many sites to time on.
        ours: our mean error and floats kept on the same adapters and sites.
        progress: told what is being done.
    """
    small, scale = replace(shape, sites=sites), shape.sites / sites
    source = Generator(small, _CPU, seed=1)
    adapters = {f"t{n}": source.adapter(n) for n in range(tasks)}
    newest = source.adapter(tasks)
    peers = []
    for method in (_restack, _vlora_incremental, _vlora_absorb, _lorashare, _rebuild):
        progress(f"timing {method.__name__.strip('_').replace('_', ' ')} on {sites} of {shape.sites} sites")
        peer = method(adapters, newest, small)
        same = peer.error <= SAME_JOB * ours[0] and peer.numbers <= 1.1 * ours[1]
        peers.append(replace(peer, seconds=peer.seconds * scale, same_job=same))
    return peers


def _restack(adapters: Mapping[str, Adapter], newest: Adapter, shape: Shape) -> Peer:
    """Reconstruct all, append, decompose, project all again: the published merge, in float32 as its authors run it."""
    g = torch.Generator().manual_seed(0)
    sites = {}
    for site in newest:
        basis = SiteBasis(
            torch.linalg.qr(torch.randn(shape.d_out, shape.cap, generator=g)).Q,
            torch.linalg.qr(torch.randn(shape.d_in, shape.cap, generator=g)).Q,
        )
        coefficients = {
            t: Core(torch.randn(shape.cap, shape.rank, generator=g), torch.randn(shape.cap, shape.rank, generator=g))
            for t in adapters
        }
        sites[site] = PaperSite(basis, coefficients)
    state = PaperState(shape.cap, centred=False, dtype=torch.float32, sites=sites)
    took = best_seconds(lambda: paper_absorb(state, "new", newest), _CPU, 2)
    found = paper_once(adapters, shape.cap)
    return Peer("restack", took, _mean(adapters, found), found.numbers, "the published merge (uncentred)", restack=True)


def _vlora_incremental(adapters: Mapping[str, Adapter], newest: Adapter, shape: Shape) -> Peer:
    return _vlora(adapters, newest, shape, "absorb_incremental")


def _vlora_absorb(adapters: Mapping[str, Adapter], newest: Adapter, shape: Shape) -> Peer:
    return _vlora(adapters, newest, shape, "absorb")


def _vlora(adapters: Mapping[str, Adapter], newest: Adapter, shape: Shape, call: str) -> Peer:
    """One component of vlora is as large as a whole adapter: k / r of them are as many floats as our bases."""
    components = max(1, shape.cap // shape.rank)
    space, weights = vlora_space({**adapters, "new": newest}, components, held_back=1)
    took = seconds(lambda: getattr(space, call)(weights["new"], "new"), _CPU)
    found = vlora_once(adapters, components)
    return Peer(
        f"vlora-dev {call}", took, _mean(adapters, found), found.numbers, f"{components} components: as many floats"
    )


def _lorashare(adapters: Mapping[str, Adapter], newest: Adapter, shape: Shape) -> Peer:
    """Lorashare decomposes all adapters anew for each new one."""
    found = lorashare({**adapters, "new": newest}, shape.cap)
    return Peer("lorashare", found.seconds, _mean(adapters, found), found.numbers, "compresses all adapters anew")


def _rebuild(adapters: Mapping[str, Adapter], newest: Adapter, shape: Shape) -> Peer:
    """The optimum needs all adapters at once."""
    found = oracle({**adapters, "new": newest}, shape.cap)
    return Peer("HOOI anew", found.seconds, _mean(adapters, found), found.numbers, "float64, all adapters at once")


def _mean(adapters: Mapping[str, Adapter], found: Compressed) -> float:
    own = errors(adapters, found)
    return sum(own.values()) / len(own)
