"""The contract emulator: CPU kernels behind the vendor's operator schemas, which check every limit."""
