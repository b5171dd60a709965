"""``python -m deepseek_jax.cli``."""

from deepseek_jax.cli import main

if __name__ == "__main__":
    main()
