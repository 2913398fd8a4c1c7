"""The command line: one file a command; `nsagen.cli.app` puts them together."""
