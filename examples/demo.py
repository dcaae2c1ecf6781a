"""CartPole in 20 minutes on two CPU cores: python -m examples.demo

Smaller batches and a larger learning rate than the paper's, so that one sees it learn. More flags
may follow: python -m examples.demo --seed 2
"""

import sys

from dreamerv3 import command_line

FLAGS = {
    "--env-id": "CartPole-v1",
    "--exp-name": "demo",
    "--size": "1m",
    "--batch-size": "8",
    "--batch-length": "16",
    "--train-ratio": "128",
    "--learning-rate": "4e-4",
    "--warmup-updates": "100",
    "--learning-starts": "512",
    "--total-timesteps": "3000",
    "--video-frequency": "500",
}

if __name__ == "__main__":
    flags = [word for pair in FLAGS.items() for word in pair]
    command_line(flags + sys.argv[1:])
