"""From a command line to running ranks: configuration, composition, launching, stopping, errors."""
