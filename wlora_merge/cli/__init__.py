"""The command line: options in, library calls, results out.

This room alone knows click and rich. It knows the front doors of the others, and nothing behind them.

main             the program: commands, exit codes, errors as one sentence: main
commands         fit, mix, export, verify, run, inspect, cache
options          the options of the commands, and help by topic
terminal         tables, progress, warnings
reference        docs/cli-reference.md, made from them
given_adapters   which adapters a command or a recipe takes
recipe           a whole job in one YAML file
recipe_schema    its JSON schema
run              what a recipe says, done
costs            what a recipe will cost
inspect_tables   what inspect shows
file_schemas     the JSON schemas of mixture.json and wlora_merge.json
schemas/         JSON schemas of recipes, of mixture.json and wlora_merge.json, and of --json outputs
"""
