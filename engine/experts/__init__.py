"""Experts of a mixture-of-experts model that do not all fit into the fast memory.

``blob`` (one expert's bytes) -> ``store`` (all of them in a file, written by ``conversion``) -> ``reader`` or
``native_reader`` (I/O threads) -> ``cache`` (slots in fast memory; ``eviction`` chooses what leaves; ``in_place`` has what needs
no slot) -> the decoder's layers.
``prediction`` names what to load ahead, ``prefetcher`` asks for it, ``planner`` decides how much memory there is.
"""
