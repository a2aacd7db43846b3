"""`torchrun ... -m sonicmoe_titan.train --job.config_file X.toml [--KEY VALUE ...]`"""

import sys

import torch.distributed as dist
from torchtitan.observability import structured_logger
from torchtitan.tools.logging import init_logger

from sonicmoe_titan.toml_config import load_config


def main(argv: list[str]) -> int:
    """Train as the TOML file and the overrides say."""
    init_logger()
    config = load_config(argv[1], argv[2:])
    structured_logger.init_structured_logger(
        source="training",
        output_dir=config.dump_folder,
        enable=config.debug.enable_structured_logging,
    )
    trainer = config.build()
    try:
        trainer.train()
    finally:
        trainer.close()
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
