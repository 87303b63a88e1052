"""The local dashboard: a small web application over run directories. It reads them and writes nothing."""
