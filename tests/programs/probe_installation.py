"""Says what `check_installation` finds, called with arguments in JSON, and what it has imported of what it judges.

For an interpreter that sees neither site-packages nor more of this repository than it needs.
"""

import json
import sys

from megatron_ext.runtime import install_check

if __name__ == "__main__":
    outcome = ["ok", ""]
    try:
        install_check.check_installation(**json.loads(sys.argv[1]))
    except BaseException as error:  # noqa: BLE001  whatever it is, it is the outcome
        outcome = [type(error).__name__, str(error)]
    loaded = sorted({"megatron", "transformer_engine", "apex"} & set(sys.modules))
    print(json.dumps([*outcome, loaded]))
