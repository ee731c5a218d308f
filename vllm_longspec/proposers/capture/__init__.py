# SPDX-License-Identifier: Apache-2.0
"""An engine that teaches: it writes its last layer's K and V and its hidden states to files, and drafts nothing."""
