"""What is held against numbers that go wrong while a run trains."""
