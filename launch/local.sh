#!/usr/bin/env bash
# Run a recipe under torchrun on this machine, one process per GPU (or NPROC of them on CPUs).
#   launch/local.sh train_grpo --config-name grpo_tiny data.train_path=my.jsonl ...
# `python recipes/train_grpo.py trainer.devices=N` does the same without torchrun; this is the form that clusters use.
# LOGS=folder keeps each rank's output there. `touch stop` where MEGATRON_EXT_STOP_FILE=stop is set: save and stop after this step.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
recipe=${1:?usage: launch/local.sh RECIPE [--config-name NAME] [overrides]}
shift
python=${PYTHON:-$root/.venv/bin/python}
"$python" "$root/recipes/registry.py" resumes "$recipe" >/dev/null # is there such a recipe?
nproc=${NPROC:-$("$python" -c 'import torch; print(torch.cuda.device_count() or 2)')}
exec "$python" -m torch.distributed.run --standalone --nproc-per-node "$nproc" ${LOGS:+--log-dir "$LOGS" --tee 3} \
    "$root/recipes/$recipe.py" "$@" "trainer.devices=$nproc"
