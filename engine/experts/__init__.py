"""Experts of a mixture-of-experts model that do not all fit into the fast memory.

``blob`` (one expert's bytes) -> ``store`` (all of them in a file, written by ``conversion``) -> ``cache`` (slots in fast memory;
``eviction`` chooses what leaves; ``in_place`` has what needs no slot) -> the decoder's layers. Of a cache there are two: one
whose decisions are native code, with ``native_loads`` as its I/O threads, and one in Python, with those of ``reader``, for GPUs
and other systems. ``prediction`` names what to load ahead, ``prefetcher`` asks for it, ``planner`` decides how much memory there is.
"""
