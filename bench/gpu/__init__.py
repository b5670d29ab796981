"""One visit to a machine with a GPU: `bash bench/gpu/visit.sh`."""
