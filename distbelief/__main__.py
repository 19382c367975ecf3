# SPDX-License-Identifier: Apache-2.0
"""`python -m distbelief` is `distbelief`."""

from distbelief.cli import command

if __name__ == "__main__":
    command()
