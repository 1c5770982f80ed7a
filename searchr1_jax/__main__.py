"""Lists the commands: python -m searchr1_jax."""

from searchr1_jax.run import command

if __name__ == "__main__":
    for name, words in command.commands().items():
        print(f"python -m searchr1_jax.{name:9} {words}")
