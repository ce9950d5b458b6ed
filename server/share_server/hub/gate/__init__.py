"""The parse gate: strangers' bytes are parsed in small processes of their own, never in the hub.

``nursery`` forks them before the hub has opened anything, ``worker`` is what runs in them, ``answers`` is what they may
say, ``parsers`` hands out the work.
"""
