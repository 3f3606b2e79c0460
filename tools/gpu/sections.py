"""The sections of the check, in the order in which they run: what is cheap and says most comes first."""

from __future__ import annotations

from tools.gpu.runner import Plan

__all__ = ["SECTIONS"]

# Seconds are limits, for one H100; all together they leave a minute of ten for starting processes anew, but for the last, which
# waits for a vLLM to start where there are two GPUs and one.
SECTIONS = {
    plan.name: plan
    for plan in (
        Plan("environment", "tools.gpu.environment", 60),
        Plan("kernels", "tools.gpu.kernels", 110),
        Plan("model", "tools.gpu.model", 80),
        Plan("memory", "tools.gpu.memory", 60),
        Plan("levers", "tools.gpu.levers", 30),
        Plan("attention", "tools.gpu.attention", 65),
        Plan("steps", "tools.gpu.steps", 55),
        Plan("demo", "tools.gpu.demo", 50),
        Plan("te", "tools.gpu.te", 30),
        Plan("transfer", "tools.gpu.transfer", 240),
    )
}
