"""`python -m tools.benchmark input` and `… step`; --help says what they do."""

import argparse
import sys

from big_vision_dpn.config import ConfigError
from tools import benchmark
from tools.benchmark import input, step

COMMANDS = {'input': input, 'step': step}


def main(argv: list[str] | None = None) -> int:
  """Runs a subcommand; returns the exit code."""
  parser = argparse.ArgumentParser(
    description=benchmark.__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  commands = parser.add_subparsers(dest='command', required=True)
  for name, module in COMMANDS.items():
    summary = module.__doc__.partition('\n')[0]
    command = commands.add_parser(
      name,
      help=summary,
      description=module.__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(command)
  args = parser.parse_args(argv)
  try:
    COMMANDS[args.command].run(args)
  except ConfigError as e:
    print(e, file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(main())
