"""What a node does next to become what its desired state says.

``plan`` is pure: (document, actual, now) in; steps, models to offer and statuses to report out. ``facts`` has the
values that go in and come out, ``items`` weighs each assignment, ``offers`` says what the host may load, ``conditions``
what is reported. The loop that acts is ``agentd/converger.py``.
"""
