"""Host memory -> a device. Knows torch, no Ray and no store."""
