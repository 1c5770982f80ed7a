"""What every room stands on: the records, the settings, the mesh, files written whole."""
