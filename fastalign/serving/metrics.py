"""What the server has done, as plain text that Prometheus reads."""

from __future__ import annotations

from fastalign.serving.service import Service


def render(service: Service) -> str:
    """One line a number. Counters end in _total; the engine's begin with fastalign_engine_."""
    engine = service.engine
    gauges = {
        "requests_live": engine.num_live,
        "requests_waiting": engine.num_waiting,
        "kv_cache_used_blocks": engine.engine.num_used_blocks,
        "weight_version": engine.engine.weight_version,
        "engine_alive": int(engine.failure is None),
    }
    lines = []
    for name, value in gauges.items():
        lines += [f"# TYPE fastalign_{name} gauge", f"fastalign_{name} {value}"]
    counts = {f"engine_{name}_total": value for name, value in vars(engine.engine.stats).items()}
    typed: set[str] = set()
    for name, value in {**dict(sorted(service.counts.items())), **counts}.items():
        family = name.partition("{")[0]
        if family not in typed:
            lines.append(f"# TYPE fastalign_{family} counter")
            typed.add(family)
        lines.append(f"fastalign_{name} {value}")
    return "\n".join(lines) + "\n"
