"""The engine's compiled core. One file a concern; data flows heap -> memory -> price -> schedule -> execute -> run."""
