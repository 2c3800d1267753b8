"""What clients write and read, and nothing else: bodies → jobs, events → answers. No socket, clock or task in here."""
