"""A script as users write them under NeMo's hydra_runner, with our errors; it is copied beside a folder conf/."""

from nemo.core.config import hydra_runner

from megatron_ext.errors import UserError
from recipes.cli.errors import user_errors


@hydra_runner(config_path="conf", config_name="start")
@user_errors()
def main(cfg):
    print("lr", cfg.lr)
    if cfg.lr > 1:
        raise UserError("lr is\ntoo large")
    if cfg.lr < 0:
        int("x")
    open(cfg.path)


if __name__ == "__main__":
    main()
