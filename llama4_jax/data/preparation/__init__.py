"""From files to clean, deduplicated, documented shards of text: what a corpus goes through before training reads it.

    corpus -> normalise, language, quality -> (annotate) -> dedup, decontaminate -> (decide) -> shards -> read

Only `normalise` imports tensorflow-text, and only `annotate` imports that: nothing that trains does, see tests/layout.
"""
