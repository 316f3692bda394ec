"""The parts of `sender.WeightSender`: what is planned (routes), what is staged (staging) and who is driven (driver)."""
